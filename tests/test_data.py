"""Evaluation data in each of its forms, and the errors of data that does not fit."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import digits
from PIL import Image

from clusterq_deploy.errors import DataError
from clusterq_deploy.evaluation.data import EvaluationSet, load_evaluation
from clusterq_deploy.models import LoadedModel, load_model
from clusterq_deploy.models.digits import TOP1

CPU = torch.device("cpu")
SHARED = os.environ.get("CLUSTERQ_DATA")
needs_shared = pytest.mark.skipif(SHARED is None, reason="CLUSTERQ_DATA names no folder of evaluation data")


def paint(file: Path, value: int, size: tuple[int, int] = (16, 16)) -> None:
    """Write a PNG of one grey value, by which tests tell images apart."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(file)


def contents(data: EvaluationSet, batch_size: int = 2) -> tuple[list[int], list[int]]:
    """Return the grey values and the labels of a set, in order."""
    values: list[int] = []
    labels: list[int] = []
    for images, batch_labels in data.batches(batch_size):
        assert images.dtype == np.float32
        assert images.ndim == 4
        assert batch_labels.dtype == np.int64
        values += np.rint(images[:, 0, 0, 0] * 255).astype(int).tolist()
        labels += batch_labels.tolist()
    return values, labels


def top1(model: LoadedModel, data: EvaluationSet) -> float:
    hits = 0
    with torch.no_grad():
        for images, labels in data.batches(128):
            hits += int((model.module(torch.from_numpy(images)).argmax(1).numpy() == labels).sum())
    return 100 * hits / len(data)


def failure(path: Path | None, model: LoadedModel, limit: int | None = None) -> str:
    """Return the message of the DataError that opening, or else reading, the data raises; checked to be one line."""
    with pytest.raises(DataError) as caught:
        list(load_evaluation(path, model, limit).batches(4))
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- the shipped images ----


def test_load_evaluation_has_held_out_images_of_digits_only(colour: LoadedModel) -> None:
    data = load_evaluation(None, digits())
    assert (len(data), data.labelled) == (450, True)
    accuracy = top1(digits(), data)
    assert accuracy >= 98
    assert accuracy == pytest.approx(TOP1, abs=0.3)
    assert "no evaluation data was given" in failure(None, colour)


# ---- the formats ----


def test_load_evaluation_labels_images_by_the_numbers_of_their_folders(tmp_path: Path, colour: LoadedModel) -> None:
    paint(tmp_path / "2" / "a.png", 20)
    paint(tmp_path / "0" / "deeper" / "b.PNG", 10)
    (tmp_path / "0" / "notes.txt").write_text("not an image")
    (tmp_path / "0" / ".hidden.png").write_text("not an image")
    data = load_evaluation(tmp_path, colour)
    assert data.name == tmp_path.name
    assert contents(data) == ([10, 20], [0, 2])


def test_load_evaluation_sorts_named_class_folders(tmp_path: Path, colour: LoadedModel) -> None:
    for value, name in enumerate(["n03", "n01", "n02"]):
        paint(tmp_path / name / "x.png", value)
    assert contents(load_evaluation(tmp_path, colour)) == ([1, 2, 0], [0, 1, 2])


@pytest.mark.parametrize("header", ["", "file,label\n", "\ufefffilename,class\n"])
def test_load_evaluation_reads_a_labels_file(tmp_path: Path, colour: LoadedModel, header: str) -> None:
    paint(tmp_path / "a.png", 1)
    paint(tmp_path / "images" / "b.png", 2)
    paint(tmp_path / "images" / "c.png", 3)
    text = f"{header}a.png,2\nb.png,0\n\nimages/c.png, 1\n"
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
    assert contents(load_evaluation(tmp_path, colour)) == ([1, 2, 3], [2, 0, 1])


@pytest.mark.parametrize("shape", [(4, 32, 32, 1), (4, 32, 32)])
def test_load_evaluation_reads_an_npz_of_grey_images(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = np.arange(4, dtype=np.uint8).repeat(32 * 32).reshape(shape)
    np.savez(tmp_path / "set.npz", images=images, labels=np.array([3, 2, 1, 0], np.int32))
    (batch, labels), *_ = load_evaluation(tmp_path / "set.npz", digits()).batches(4)
    mean, std = digits().input.mean[0], digits().input.std[0]
    np.testing.assert_allclose(batch[:, 0, 5, 5], (np.arange(4) / 255 - mean) / std, rtol=1e-6)
    np.testing.assert_array_equal(labels, [3, 2, 1, 0])


def test_load_evaluation_reads_an_npz_of_colour_images(tmp_path: Path, colour: LoadedModel) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=np.array([0, 2]))
    ((batch, _),) = load_evaluation(tmp_path / "set.npz", colour).batches(2)
    np.testing.assert_array_equal(batch, images.transpose(0, 3, 1, 2) / np.float32(255))


def test_load_evaluation_spaces_a_limit_over_the_classes(tmp_path: Path, colour: LoadedModel) -> None:
    for value in range(9):
        paint(tmp_path / str(value // 3) / f"{value}.png", value)
    assert contents(load_evaluation(tmp_path, colour, limit=3)) == ([0, 3, 6], [0, 1, 2])
    assert len(load_evaluation(tmp_path, colour, limit=100)) == 9
    assert "expected at least 1" in failure(tmp_path, colour, limit=0)


def test_batches_keep_the_order_and_can_be_read_again(tmp_path: Path, colour: LoadedModel) -> None:
    for value in range(5):
        paint(tmp_path / "0" / f"{value}.png", value)
    data = load_evaluation(tmp_path, colour)
    assert [len(images) for images, _ in data.batches(2)] == [2, 2, 1]
    assert contents(data, batch_size=2) == contents(data, batch_size=5) == ([0, 1, 2, 3, 4], [0] * 5)
    with pytest.raises(ValueError, match="batch_size is 0"):
        next(data.batches(0))


def test_from_images_needs_no_labels() -> None:
    images = np.random.default_rng(0).normal(size=(5, 3, 4, 4)).astype(np.float32)
    data = EvaluationSet.from_images("synthetic", images)
    batches = list(data.batches(3))
    assert (data.name, len(data), data.labelled) == ("synthetic", 5, False)
    assert [labels for _, labels in batches] == [None, None]
    np.testing.assert_array_equal(np.concatenate([batch for batch, _ in batches]), images)
    assert EvaluationSet.from_images("labelled", images, [0, 1, 2, 3, 4]).labelled
    with pytest.raises(DataError, match=r"labels have shape \(2,\); expected \(5,\)"):
        EvaluationSet.from_images("short", images, [0, 1])
    with pytest.raises(DataError, match=r"expected \(N, C, H, W\)"):
        EvaluationSet.from_images("flat", images[0])


# ---- what does not fit ----


def test_load_evaluation_refuses_paths_without_data(tmp_path: Path, colour: LoadedModel) -> None:
    assert "does not exist" in failure(tmp_path / "absent", colour)
    assert "neither labels.csv nor folders" in failure(tmp_path, colour)
    (tmp_path / "0").mkdir()
    assert "no images were found" in failure(tmp_path, colour)
    (tmp_path / "data.zip").write_bytes(b"")
    assert "unknown format" in failure(tmp_path / "data.zip", colour)
    for name in ("cat", "dog"):
        paint(tmp_path / "pets" / name / "x.png", 0)
    assert "has 2 class folders, but the model has 3 classes" in failure(tmp_path / "pets", colour)


@pytest.mark.parametrize("outside", ["/etc/hosts", "../other.png", "images/../../other.png", "..\\x.png", "C:\\x.png"])
def test_load_evaluation_refuses_files_outside_of_the_folder(tmp_path: Path, colour: LoadedModel, outside: str) -> None:
    paint(tmp_path / "other.png", 0)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "labels.csv").write_text(f"{outside},0\n")
    assert "outside of the folder" in failure(tmp_path / "set", colour)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("missing.png,0", "row 2 names 'missing.png'"),
        ("x.png,cat", "expected file,label"),
        ("x.png", "expected file,label"),
        ("x.png,3", "labels up to 3, but the model has 3 classes"),
        ("x.png,-1", "labels down to -1"),
        (f"x.png,{10**30}", "labels up to 1000"),
        ("\xff\xfe\x00", "UnicodeDecodeError"),
    ],
)
def test_load_evaluation_refuses_wrong_rows_of_a_labels_file(
    tmp_path: Path, colour: LoadedModel, row: str, message: str
) -> None:
    paint(tmp_path / "x.png", 0)
    (tmp_path / "labels.csv").write_bytes(b"x.png,0\n" + row.encode("latin-1") + b"\n")
    assert message in failure(tmp_path, colour)


def test_load_evaluation_refuses_a_link_out_of_the_folder(tmp_path: Path, colour: LoadedModel) -> None:
    paint(tmp_path / "other.png", 0)
    paint(tmp_path / "set" / "own.png", 7)
    table = tmp_path / "set" / "labels.csv"
    (tmp_path / "set" / "within.png").symlink_to("own.png")
    (tmp_path / "set" / "out.png").symlink_to(tmp_path / "other.png")
    (tmp_path / "set" / "folder").symlink_to(tmp_path)
    for name in ("out.png", "folder/other.png"):
        table.write_text(f"{name},0\n")
        assert "a link out of the folder" in failure(tmp_path / "set", colour)
    table.write_text("within.png,1\n")
    assert contents(load_evaluation(tmp_path / "set", colour)) == ([7], [1])


IMAGES = np.zeros((2, 16, 16, 3), np.uint8)
LABELS = np.array([0, 1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES}, "has no labels"),
        ({"labels": LABELS}, "has no images"),
        ({"images": IMAGES.astype(np.float32), "labels": LABELS}, "float32"),
        ({"images": IMAGES[0, 0], "labels": LABELS}, "has images (16, 3)"),
        ({"images": IMAGES, "labels": LABELS[:1]}, "has labels (1,)"),
        ({"images": IMAGES, "labels": LABELS * 0.5}, "float64 for 2 images"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "has no images"),
        ({"images": IMAGES, "labels": LABELS + 98}, "labels up to 99, but the model has 3 classes"),
        ({"images": IMAGES, "labels": np.full(2, 2**64 - 1, np.uint64)}, "labels up to 18446744073709551615"),
        ({"images": IMAGES[..., :1], "labels": LABELS}, "1 channels, but the model has 3"),
        ({"images": np.array([{}, {}], object), "labels": LABELS}, "allow_pickle=False"),
    ],
)
def test_load_evaluation_refuses_an_npz_of_other_arrays(
    tmp_path: Path, colour: LoadedModel, arrays: dict[str, np.ndarray], message: str
) -> None:
    np.savez(tmp_path / "set.npz", **arrays)
    assert message in failure(tmp_path / "set.npz", colour)


def test_load_evaluation_refuses_a_damaged_npz(tmp_path: Path, colour: LoadedModel) -> None:
    file = tmp_path / "set.npz"
    np.save(tmp_path / "plain.npy", IMAGES)
    for data in (b"", b"PK\x03\x04 damaged", b"text", (tmp_path / "plain.npy").read_bytes()):
        file.write_bytes(data)
        assert "cannot read" in failure(file, colour)


# ---- real data ----


@needs_shared
def test_published_accuracy_on_cifar10() -> None:
    model = load_model(f"{SHARED}/models.py:resnet20_cifar10", device=CPU)
    data = load_evaluation(Path(f"{SHARED}/cifar10_test.npz"), model, limit=500)
    assert top1(model, data) == pytest.approx(91.36, abs=4)


@needs_shared
def test_published_accuracy_on_imagenet() -> None:
    model = load_model(f"{SHARED}/models.py:mobilenet_v1_025", device=CPU)
    data = load_evaluation(Path(f"{SHARED}/imagenet_val"), model)
    assert len(data) == 650
    assert next(data.batches(2))[0].shape == (2, 3, 224, 224)
    assert top1(model, load_evaluation(Path(f"{SHARED}/imagenet_val"), model, limit=100)) == pytest.approx(66.8, abs=12)
