"""Predictions and their scores."""

import numpy as np
import pytest
from test_latency import Fixed

from clusterq_deploy.errors import DataError
from clusterq_deploy.evaluation.accuracy import predictions, score
from clusterq_deploy.evaluation.data import EvaluationSet


def test_predictions_are_the_five_best_with_ties_to_the_lower_class() -> None:
    logits = np.array([[0, 5, 1, 2, 3, 4], [7, 7, 0, 0, 0, 0]], np.float32)
    data = EvaluationSet.from_images("x", logits.reshape(2, 1, 1, 6))
    assert predictions(Fixed(), data, 1).tolist() == [[1, 5, 4, 3, 2], [0, 1, 2, 3, 4]]


def test_score_is_in_percent() -> None:
    images = np.zeros((4, 1, 1, 6), np.float32)
    data = EvaluationSet.from_images("x", images, [1, 2, 3, 0])
    predicted = np.array([[1, 0, 2, 3, 4], [0, 2, 1, 3, 4], [5, 0, 1, 2, 4], [0, 1, 2, 3, 4]])
    teacher = np.array([[1, 0, 2, 3, 4], [2, 0, 1, 3, 4], [5, 0, 1, 2, 4], [0, 1, 2, 3, 4]])
    scored = score("torch", predicted, teacher, data, "file")
    assert (scored.top1, scored.top5, scored.agreement, scored.graph) == (50, 75, 75, "file")
    scored = score("torch", predicted, teacher, EvaluationSet.from_images("x", images))
    assert (scored.top1, scored.top5, scored.agreement) == (None, None, 75)
    with pytest.raises(DataError, match="do not fit"):
        score("torch", predicted[:2], teacher, data)
