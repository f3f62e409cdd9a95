"""Statistics of BatchNorm inputs, against plain formulas."""

import pytest
import torch
from nets import images, make_net
from torch import nn

from calib.bn_statistics import (
    Centroids,
    Moments,
    batchnorm_layers,
    class_averaging_matrix,
    tap_batchnorm,
    within_class_diversity,
)
from calib.losses import bns_loss, icv_loss, image_variance_loss, sfda_loss, total_variation
from calib.support.errors import NoBatchNormError


def test_moments_pool_to_what_the_pixels_say() -> None:
    x = torch.randn(6, 3, 4, 5)
    labels = torch.tensor([0, 0, 2, 2, 2, 1])
    keep = torch.tensor([True, True, True, False, True, False])
    present, shares = class_averaging_matrix(labels, keep)
    mean, std = Moments.of(x).pooled(shares)
    assert present.tolist() == [0, 2]
    for row, chosen in enumerate([x[[0, 1]], x[[2, 4]]]):
        torch.testing.assert_close(mean[row], chosen.mean((0, 2, 3)))
        torch.testing.assert_close(std[row], chosen.std((0, 2, 3), correction=0))


def test_moments_of_a_batch_and_of_vectors() -> None:
    x = torch.randn(6, 3, 4, 5)
    mean, std = Moments.of(x).batch()
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(std, x.std((0, 2, 3), correction=0))
    mean, std = Moments.of(x[:, :, 0, 0]).batch()
    torch.testing.assert_close(std, x[:, :, 0, 0].std(0, correction=0))


def test_moments_have_the_gradient_of_their_formulas() -> None:
    x = torch.randn(6, 3, 4, 5).add(2).requires_grad_()
    weights = torch.randn(2, 6, 3)
    mean, var = x.mean((2, 3)), x.var((2, 3), correction=0)
    (expected,) = torch.autograd.grad((weights[0] * mean + weights[1] * var).sum(), x)
    own = Moments.of(x)
    (found,) = torch.autograd.grad((weights[0] * own.mean + weights[1] * own.var).sum(), x)
    torch.testing.assert_close(own.var, var, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, expected)
    half = x.detach().bfloat16().requires_grad_()
    Moments.of(half).var.sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


def test_tap_sees_every_batchnorm_input_and_leaves_no_hook() -> None:
    net = make_net("residual")
    layers = batchnorm_layers(net)
    with tap_batchnorm(net) as tap:
        net(images(4))
        net(images(4))  # a second pass starts anew
        assert len(tap.moments) == len(layers)
        first = net.stem[0](images(4))  # type: ignore[union-attr, operator, index]
    torch.testing.assert_close(tap.moments[0].mean, first.mean((2, 3)))
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in net.modules())


@pytest.mark.parametrize("affine", [True, False])
def test_a_tapped_batchnorm_answers_and_has_the_gradient_as_without(affine: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    norm = nn.BatchNorm2d(3, affine=affine).eval()
    for value in norm.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(3, generator=rng) + 0.5)
    x = torch.randn(6, 3, 4, 5, generator=rng).contiguous(memory_format=torch.channels_last).requires_grad_()
    weights = torch.randn(6, 3, 4, 5, generator=rng), torch.randn(2, 6, 3, generator=rng)
    mean, var, y = x.mean((2, 3)), x.var((2, 3), correction=0), norm(x)
    total = (weights[0] * y).sum() + (weights[1][0] * mean + weights[1][1] * var).sum()
    (expected,) = torch.autograd.grad(total, x)
    with tap_batchnorm(norm) as tap:
        tapped = norm(x)
    (own,) = tap.moments
    total = (weights[0] * tapped).sum() + (weights[1][0] * own.mean + weights[1][1] * own.var).sum()
    assert torch.equal(tapped, y)
    torch.testing.assert_close(torch.autograd.grad(total, x)[0], expected)
    assert "forward" not in vars(norm)


def test_a_batchnorm_with_a_forward_of_its_own_is_tapped_as_it_is() -> None:
    class Rectified(nn.BatchNorm2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).relu()

    net, x = Rectified(3).eval(), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = net(x)
    with tap_batchnorm(net) as tap:
        assert torch.equal(net(x), expected)
    torch.testing.assert_close(tap.moments[0].mean, x.mean((2, 3)))
    assert not net._forward_pre_hooks


def test_no_batchnorm_is_refused() -> None:
    with pytest.raises(NoBatchNormError, match="no BatchNorm layer"):
        batchnorm_layers(nn.Sequential(nn.Conv2d(3, 3, 1)))


def test_bns_is_zero_where_the_batch_is_what_the_buffers_hold() -> None:  # (9)
    x = torch.randn(64, 3, 8, 8)
    norm = nn.BatchNorm2d(3, eps=1e-12, momentum=1.0)
    norm(x)
    norm.running_var.copy_(x.var((0, 2, 3), correction=0))  # type: ignore[union-attr]
    net = norm.eval()
    with tap_batchnorm(net) as tap:
        net(x)
        assert float(bns_loss(tap)) < 1e-10
        net(2 * x + 1)
        own = (2 * x + 1).mean((0, 2, 3)) - x.mean((0, 2, 3))
        spread = x.std((0, 2, 3), correction=0)
        expected = own.square().mean() + spread.square().mean()
        torch.testing.assert_close(bns_loss(tap), expected)
        torch.testing.assert_close(bns_loss(tap, [0.5]), expected / 2)


def test_centroids_follow_by_beta_and_start_from_the_first_batch() -> None:  # (5)
    centroids = Centroids(3, torch.device("cpu"))
    first, second = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    labels = torch.tensor([0, 0, 2, 2])
    everyone = torch.ones(4, dtype=torch.bool)
    centroids.update([Moments.of(first)], *class_averaging_matrix(labels, everyone), 0.2)
    assert centroids.seen.tolist() == [True, False, True]
    torch.testing.assert_close(centroids.mean[0][2], first[2:].mean((0, 2, 3)))
    only_zero = torch.tensor([True, True, False, False])
    centroids.update([Moments.of(second)], *class_averaging_matrix(labels, only_zero), 0.2)
    expected = 0.8 * first[:2].mean((0, 2, 3)) + 0.2 * second[:2].mean((0, 2, 3))
    torch.testing.assert_close(centroids.mean[0][0], expected)
    torch.testing.assert_close(centroids.mean[0][2], first[2:].mean((0, 2, 3)))  # discarded samples move nothing


def test_alignment_is_a_distance_to_the_class_own_centroid() -> None:  # (4)
    x = torch.randn(4, 2, 3, 3)
    labels, everyone = torch.tensor([0, 0, 1, 1]), torch.ones(4, dtype=torch.bool)
    present, shares = class_averaging_matrix(labels, everyone)
    centroids = Centroids(2, torch.device("cpu"))
    moments = [Moments.of(x)]
    centroids.update(moments, present, shares, 0.2)
    assert float(sfda_loss(moments, centroids, present, shares)) < 1e-12
    centroids.mean[0][1] += torch.tensor([1.0, 3.0])
    torch.testing.assert_close(sfda_loss(moments, centroids, present, shares), torch.tensor(2.5))


def test_intra_class_variance_is_a_distance_to_a_noisy_centroid() -> None:  # (6)
    centroids = Centroids(1, torch.device("cpu"))
    moments = [Moments.of(torch.randn(2, 2, 4, 4))]
    present, shares = class_averaging_matrix(torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.bool))
    centroids.update(moments, present, shares, 0.2)
    statistics = [(centroids.mean[0], centroids.std[0])]
    spreads, noise = [torch.tensor([2.0, 4.0])], [(torch.ones(1, 2), torch.zeros(1, 2))]
    loss = icv_loss(statistics, centroids, present, spreads, noise, 0.5, 1.0)
    torch.testing.assert_close(loss, torch.tensor((1.0**2 + 2.0**2) / 2))


def test_diversity_is_the_share_of_variance_within_classes() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    assert within_class_diversity(torch.tensor([[0.0], [0.0], [4.0], [4.0]]), labels) == 0
    assert within_class_diversity(torch.tensor([[0.0], [4.0], [0.0], [4.0]]), labels) == pytest.approx(1)
    mixed = torch.tensor([[0.0], [2.0], [4.0], [6.0]])  # total 5, within 1
    assert within_class_diversity(mixed, labels) == pytest.approx(0.2)


def test_total_variation_of_a_ramp() -> None:
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    assert float(total_variation(ramp)) == 1.0


@pytest.mark.parametrize("shape", [(19, 3, 7, 9), (2, 1, 2, 5), (1, 1, 1, 1)])
def test_total_variation_has_the_gradient_of_its_equation(shape: tuple[int, ...]) -> None:
    pixels = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(total_variation, pixels)


def test_moments_of_more_than_is_looked_at_together_are_those_of_each_image() -> None:
    x = images(300).repeat(1, 1, 4, 4)
    whole, apart = Moments.of(x), [Moments.of(one) for one in x.split(1)]
    torch.testing.assert_close(whole.mean, torch.cat([own.mean for own in apart]))
    torch.testing.assert_close(whole.var, torch.cat([own.var for own in apart]))


def test_spread_is_missed_by_images_that_are_alike_and_costs_nothing_once_there() -> None:
    net = make_net("residual")
    one = images(1)
    alike, apart = one.expand(16, -1, -1, -1), images(16) * torch.linspace(0.2, 4, 16).view(-1, 1, 1, 1)
    with tap_batchnorm(net) as tap:
        net(alike)
        shortfall = float(image_variance_loss(tap, 0.08, 0.03))
        assert shortfall == pytest.approx(2 * len(tap.layers), rel=1e-3)
        net(apart)
        assert float(image_variance_loss(tap, 1e-4, 1e-4)) < 0.05 * shortfall
        wanted = images(16).requires_grad_()
        net(wanted)
        image_variance_loss(tap, 10.0, 10.0).backward()
        assert wanted.grad is not None
        assert float(wanted.grad.abs().sum()) > 0
