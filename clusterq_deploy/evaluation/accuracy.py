"""Accuracy of a model in a runtime."""

import numpy as np
import numpy.typing as npt
import torch

from calib.support.checkpoint import NOWHERE, Checkpoint, State
from calib.support.progress import SILENT, Progress
from clusterq_deploy.errors import DataError
from clusterq_deploy.evaluation.data import EvaluationSet
from clusterq_deploy.oom import infer_split_on_oom
from clusterq_deploy.results.report import Accuracy, LabelCheck
from clusterq_deploy.runtimes.runners import Runner

Predictions = npt.NDArray[np.int64]

_FEWEST = 20
_PERMUTATIONS, _RENAMED_PERMUTATIONS = 200, 5
_LARGEST = 2**22
"""The entries of a confusion matrix whose best renaming takes about a second."""


def predictions(
    runner: Runner,
    data: EvaluationSet,
    batch_size: int,
    progress: Progress = SILENT,
    checkpoint: Checkpoint = NOWHERE,
    phase: str = "predictions",
) -> Predictions:
    """Return the five most likely classes of each readable image, most likely first: (N, min(5, classes)) int64.

    Ties go to the lower class. If a batch does not fit the memory, it and those after it are computed in parts.

    Args:
        checkpoint: saves the predictions so far, for the same runner on the same data.
        phase: this runner's name in the checkpoint.

    Raises:
        DataError: too many images cannot be read.
        OutOfMemoryError: the smallest parts do not fit the memory.
    """
    infer, ranked = infer_split_on_oom(runner.infer, f"evaluation on {runner.runtime}"), []
    if saved := checkpoint.load(phase):
        data.unreadable.restore(saved["unreadable"])
        ranked.append(saved["found"].numpy())

    def state() -> State:
        return predictions_state(np.concatenate(ranked), data)

    with progress.task(f"Evaluating on {runner.runtime}", len(data)) as advance:
        done = sum(map(len, ranked))
        advance(done)
        for images, _ in data.batches(batch_size, done):
            ranked.append(np.argsort(-infer(images), axis=1, kind="stable")[:, :5])
            checkpoint.save(phase, state)
            advance(len(images))
    checkpoint.save(phase, state, at_once=True)
    return np.concatenate(ranked)


def predictions_state(ranked: Predictions, data: EvaluationSet) -> State:
    """Return the checkpoint's state of `predictions` of the first images of the set."""
    return {"found": torch.from_numpy(ranked), "unreadable": data.unreadable.rows()}


def score(
    runtime: str, predicted: Predictions, teacher: Predictions, data: EvaluationSet, graph: str | None = None
) -> Accuracy:
    """Return the accuracy of a model, in percent, and its agreement with the teacher on the readable images.

    Args:
        predicted, teacher: (N, 5) from `predictions`, on the same images.
        graph: the executed file.

    Raises:
        DataError: the counts differ.
    """
    readable = data.readable
    if len(predicted) != len(teacher) or len(predicted) != len(readable):
        raise DataError(
            f"{len(predicted)} predictions, {len(teacher)} of the teacher and {len(readable)} images do not fit: "
            "leave the data as it is while it is evaluated"
        )
    top1 = top5 = None
    if data.labels is not None:
        hits = predicted == data.labels[readable, None]
        top1, top5 = 100 * float(hits[:, 0].mean()), 100 * float(hits.any(axis=1).mean())
    agreement = 100 * float((predicted[:, 0] == teacher[:, 0]).mean())
    return Accuracy(runtime=runtime, top1=top1, top5=top5, agreement=agreement, graph=graph)


def check_labels(predicted: Predictions, data: EvaluationSet) -> LabelCheck | None:
    """Test whether a model's predictions and the labels of the readable images belong together.

    Args:
        predicted: (N, 5) from `predictions`.

    Returns:
        The tests; None without labels, for fewer than 20 images, or if all have one label.
    """
    if data.labels is None or len(predicted) < _FEWEST:
        return None
    labels, top = data.labels[data.readable], predicted[:, 0]
    if len(labels) != len(top) or (labels == labels[0]).all():
        return None
    rng, measured = np.random.default_rng(0), 100 * float((labels == top).mean())
    permuted = np.array([100 * float((rng.permutation(labels) == top).mean()) for _ in range(_PERMUTATIONS)])
    renamed, control = _renamed(labels, top), None
    if renamed is not None:
        control = float(np.mean([_renamed(rng.permutation(labels), top) for _ in range(_RENAMED_PERMUTATIONS)]))
    shifted = {shift: 100 * float((labels + shift == top).mean()) for shift in (-1, 1)}
    shift = -1 if shifted[-1] > shifted[1] else 1
    explained = renamed is not None and shifted[shift] > max(measured, 0.75 * renamed)
    return LabelCheck(
        top1=measured,
        permutations=_PERMUTATIONS,
        permuted=float(permuted.mean()),
        reaching=float((permuted >= measured).mean()),
        renamed=renamed,
        renamed_permuted=control,
        shift=shift if explained else None,
        shifted=shifted[shift] if explained else None,
    )


def _renamed(labels: npt.NDArray[np.int64], top: npt.NDArray[np.int64]) -> float | None:
    """Return the top-1, in percent, after the best one-to-one renaming of the labels; None of too many classes."""
    given, rows = np.unique(labels, return_inverse=True)
    answers, columns = np.unique(top, return_inverse=True)
    shape = len(given), len(answers)
    if shape[0] * shape[1] > _LARGEST:
        return None
    from scipy.optimize import linear_sum_assignment  # its import takes a third of a second

    confusion = np.bincount(rows * shape[1] + columns, minlength=shape[0] * shape[1]).reshape(shape)
    return 100 * float(confusion[linear_sum_assignment(confusion, maximize=True)].sum()) / len(labels)
