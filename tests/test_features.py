"""The teacher's penultimate features: taken where the classifier reads them, measured, projected."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import NETS, captured, images, make_net
from sklearn.metrics import silhouette_samples
from support import seeded
from torch import Tensor, nn

from clusterq_deploy.errors import FeatureError
from clusterq_deploy.evaluation.data import EvaluationSet
from clusterq_deploy.evaluation.features import (
    capture,
    compare_features,
    density_and_coverage,
    evenly,
    most_frequent,
    penultimate,
    project,
    separation,
)
from clusterq_deploy.models.digits import digits
from clusterq_deploy.results.report import FeatureInfo
from clusterq_deploy.runtimes.runners import Array

PARTS = (np.arange(60) % 4).astype(np.int64)


def clusters(std: float, distance: float, labels: np.ndarray = PARTS, width: int = 12, seed: int = 0) -> Array:
    """Draw Gaussian clouds of deviation `std`, one per class, around centres of deviation `distance`."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(10, width)) * distance
    return (centres[labels] + rng.normal(size=(len(labels), width)) * std).astype(np.float32)


# Where features are taken


@torch.no_grad()
def test_penultimate_agrees_with_a_forward_pass_by_hand() -> None:
    net, x = digits(), torch.randn(7, 1, 32, 32, generator=seeded(0))
    y = net.layer2(net.layer1(F.relu(net.bn1(net.conv1(x)))))
    features = penultimate(captured(net, (1, 32, 32)), 10)(x)
    assert torch.equal(features, y.mean((2, 3)))
    torch.testing.assert_close(net.fc(features), net(x))


@torch.no_grad()
@pytest.mark.parametrize("name", NETS)
def test_penultimate_returns_what_the_classifier_turns_into_logits(name: str) -> None:
    net, x = make_net(name), images(5)
    (classifier,) = (layer for layer in net.modules() if isinstance(layer, nn.Linear))
    torch.testing.assert_close(classifier(penultimate(captured(net), 10)(x)), net(x))


class Convolutional(nn.Module):
    """Its classifier is a 1x1 convolution, registered first, and averaged afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 10, 1)
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return F.relu(self.first(x)).mean((2, 3))


class Prototypes(Convolutional):
    """Its classifier is not a layer: it multiplies what it reads by what it reads."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)[:, :, None]
        return (y @ y.transpose(1, 2)).mean(2)


@torch.no_grad()
def test_penultimate_accepts_a_convolution_as_classifier() -> None:
    net, x = Convolutional().eval(), images(5)
    by_hand = F.relu(net.norm(net.stem(x))).mean((2, 3))
    torch.testing.assert_close(penultimate(captured(net), 10)(x), by_hand)


@torch.no_grad()
def test_penultimate_accepts_a_linear_that_classifies_every_position() -> None:
    class Positions(Convolutional):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(F.relu(self.norm(self.stem(x))).permute(0, 2, 3, 1)).mean((1, 2))

    net, x = Positions().eval(), images(5)
    torch.testing.assert_close(net.linear(penultimate(captured(net), 10)(x)), net(x))


def test_penultimate_refuses_a_classifier_that_is_no_layer() -> None:
    with pytest.raises(FeatureError, match=r"last layer of Prototypes is .*matmul.*Linear or Conv2d of 10 outputs"):
        penultimate(captured(Prototypes().eval()), 10)
    with pytest.raises(FeatureError, match="of 11 outputs"):
        penultimate(captured("residual"), 11)


def test_capture_keeps_the_order_and_the_teacher() -> None:
    net = make_net("residual")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = images(120)
    features = capture(penultimate(captured(net), 10), EvaluationSet.from_images("x", x.numpy()))
    assert (features.shape, features.dtype) == ((120, 32), np.float32)
    np.testing.assert_allclose(features, penultimate(captured(net), 10)(x).numpy(), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_capture_refuses_features_that_are_not_finite() -> None:
    x = images(4)
    x[2] = torch.inf
    with pytest.raises(FeatureError, match="features of broken have values that are not finite"):
        capture(penultimate(captured("residual"), 10), EvaluationSet.from_images("broken", x.numpy()))


# Which images count


def test_most_frequent_spaces_tied_classes_evenly() -> None:
    labels = np.array([5, 5, 5, 0, 1, 2, 3, 3, 4, 6], np.int64)
    assert most_frequent(labels, 2).tolist() == [3, 5]
    assert most_frequent(labels, 4).tolist() == [0, 2, 3, 5]  # 0 and 2 of the tied 0, 1, 2, 4, 6
    assert most_frequent(labels, 7).tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_evenly_chooses_as_many_images_of_each_class() -> None:
    labels = np.arange(4000, dtype=np.int64) % 10  # every second of these would be the even classes
    chosen = evenly(labels, np.arange(10), 2000)
    assert np.bincount(labels[chosen]).tolist() == [200] * 10
    assert (np.diff(chosen) > 0).all()
    assert labels[evenly(labels, np.array([3, 7]), 5)].tolist().count(3) in (2, 3)
    assert evenly(labels, np.array([12]), 5).tolist() == []


# What is measured


def test_separation_of_separate_mixed_and_collapsed_classes() -> None:
    apart, mixed = separation(clusters(0.05, 3), PARTS), separation(clusters(1, 0), PARTS)
    assert apart.silhouette > 0.95
    assert mixed.silhouette == pytest.approx(0, abs=0.1)
    assert mixed.within_class_diversity == pytest.approx(1, abs=0.1)
    assert separation(clusters(1e-3, 3), PARTS).within_class_diversity == pytest.approx(0, abs=1e-5)
    halfway = clusters(1, 1)
    assert separation(halfway, PARTS).silhouette == pytest.approx(silhouette_samples(halfway, PARTS).mean())


@pytest.mark.parametrize(
    ("labels", "features", "reason"),
    [
        ([2, 2, 2, 2], clusters(1, 1, np.zeros(4, np.int64)), "fewer than two classes"),
        ([0, 1, 2, 3], clusters(1, 1, np.arange(4)), "fewer than two classes"),
        ([0, 0, 1, 2], clusters(1, 1, np.arange(4)), "fewer than two classes"),
        ([1], clusters(1, 1, np.zeros(1, np.int64)), "fewer than two classes"),
        ([0, 0, 1, 1], np.ones((4, 3), np.float32), "all images are the same"),
        ([0, 0, 1, 1], np.zeros((4, 3), np.float32), "all images are the same"),
    ],
)
def test_separation_says_why_it_is_not_defined(labels: list[int], features: Array, reason: str) -> None:
    result = separation(features, np.array(labels, np.int64))
    assert (result.silhouette, result.within_class_diversity) == (None, None)
    assert reason in str(result.reason)


def test_separation_leaves_out_a_class_of_one_image() -> None:
    features, odd = clusters(0.3, 1), np.append(PARTS, 7)
    whole = np.concatenate([features, np.full((1, 12), 50, np.float32)])
    assert separation(whole, odd) == separation(features, PARTS)


def test_density_and_coverage_of_like_collapsed_and_strange_features() -> None:
    labels = (np.arange(300) % 6).astype(np.int64)
    real, like, strange = (clusters(1, 4, labels, seed=seed) for seed in range(3))
    density, coverage = density_and_coverage(real, like)
    assert density == pytest.approx(1, abs=0.2)
    assert coverage > 0.9
    half = clusters(1, 4, labels % 3, seed=4)  # three of the six classes are missing
    assert density_and_coverage(real, half)[1] == pytest.approx(0.5, abs=0.06)
    assert density_and_coverage(real, strange + 100) == (0, 0)
    assert density_and_coverage(real[:5], like) is None


# The projection


def test_project_keeps_classes_apart_and_is_the_same_again() -> None:
    features = clusters(0.3, 3)
    places, parameters = project(features, 2**32 + 5)
    assert parameters == {"perplexity": 59 / 3, "init": "pca", "random_state": 5, "max_iter": 500}
    assert places.shape == (60, 2)
    assert separation(places, PARTS).silhouette > 0.7
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again, _ = project(features, 5)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(places, again)


@pytest.mark.parametrize(
    "features", [*(clusters(1, 1)[:count] for count in (1, 2, 3)), np.ones((20, 6), np.float32), clusters(1, 1)[:, :1]]
)
def test_project_refuses_too_little(features: Array) -> None:
    assert project(features, 0) is None


@pytest.mark.parametrize("features", [*(clusters(1, 1)[:count] for count in (4, 5, 9)), clusters(0, 3)])
def test_project_accepts_few_images_and_collapsed_classes(features: Array) -> None:
    places, parameters = project(features, 0)
    assert np.isfinite(places).all()
    assert float(parameters["perplexity"]) < len(features)


# All of it


def labelled(name: str, x: Tensor, labels: object) -> EvaluationSet:
    return EvaluationSet.from_images(name, x.numpy(), labels)  # type: ignore[arg-type]


def compared(synthetic: EvaluationSet, real: EvaluationSet | None) -> FeatureInfo:
    return compare_features(captured("residual"), synthetic, real, classes=10, seed=0)


def test_compare_features_projects_two_sets_together() -> None:
    synthetic = labelled("made", images(40), np.arange(40) % 10)
    real = labelled("true", images(30, seed=2), np.arange(30) % 5)
    info = compared(synthetic, real)
    assert (info.width, info.notes) == (32, [])
    assert (info.synthetic.images, info.synthetic.classes) == (40, 10)
    assert info.synthetic.points.labels == [n % 10 for n in range(40)]
    info_real = info.real
    assert (info_real.dataset, info_real.images, info_real.classes) == ("true", 30, 5)
    assert len(info_real.points.x) == len(info_real.points.y) == 30
    assert info.projection.parameters["perplexity"] == pytest.approx(69 / 3)
    features = penultimate(captured("residual"), 10)(images(40)).numpy()
    silhouette = silhouette_samples(features, np.arange(40) % 10).mean()
    assert info.synthetic.silhouette == pytest.approx(silhouette, rel=1e-3)
    assert info == compared(synthetic, real)
    without = compared(synthetic, None)  # real images change nothing in the numbers of synthetic ones
    assert "No labelled images were given" in without.notes[0]
    assert (without.real, without.density, without.coverage) == (None, None, None)
    assert without.synthetic.silhouette == info.synthetic.silhouette
    assert without.synthetic.within_class_diversity == info.synthetic.within_class_diversity


def test_compare_features_notes_one_class_and_other_real_classes() -> None:
    info = compared(labelled("made", images(6), [4] * 6), labelled("true", images(6, seed=2), [1] * 6))
    assert (info.synthetic.silhouette, info.synthetic.within_class_diversity, info.real) == (None, None, None)
    assert any("No image of true is of a compared class" in note for note in info.notes)
    assert any("No silhouette and no diversity of synthetic images" in note for note in info.notes)
    assert len(info.synthetic.points.labels) == 6


def test_compare_features_of_two_images_has_no_numbers_and_no_projection() -> None:
    info = compared(labelled("made", images(2), [0, 1]), labelled("true", images(1, seed=2), [0]))
    assert (info.real.silhouette, info.coverage, info.projection) == (None, None, None)
    assert info.synthetic.points.x == []
    assert len(info.notes) == 4


def test_compare_features_shows_ten_of_many_classes() -> None:
    info = compared(labelled("made", images(48), np.arange(48) % 24), None)
    assert (info.synthetic.images, info.synthetic.classes) == (48, 24)
    assert len(set(info.synthetic.points.labels)) == 10
    assert max(info.synthetic.points.labels) > 20
