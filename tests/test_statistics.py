"""Statistics of BatchNorm inputs and the losses on them, against plain formulas."""

import math

import pytest
import torch
from nets import images, make_net
from support import seeded
from torch import Tensor, nn

from calib.bn_statistics import (
    Centroids,
    DistanceMeter,
    Moments,
    Tap,
    batchnorm_layers,
    class_averaging_matrix,
    never_trained,
    tap_batchnorm,
    within_class_diversity,
)
from calib.kernels import total_variation
from calib.losses import bns_loss, icv_loss, image_variance_loss, sfda_loss
from calib.support.errors import NoBatchNormError


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def matrix(*labels: int) -> tuple[Tensor, Tensor]:
    return class_averaging_matrix(torch.tensor(labels), torch.ones(len(labels), dtype=torch.bool))


def test_tap_pools_the_tokens_of_a_sample() -> None:
    """A BatchNorm over all tokens of all images, as (N * L, C), has the moments of (N, C, L)."""
    norm, x = nn.BatchNorm1d(4).eval(), torch.randn(3, 5, 4, generator=seeded())
    net = nn.Sequential(nn.Flatten(0, 1), norm)
    with tap_batchnorm(net) as tap:
        net(x)
    expected = Moments.of(x.transpose(1, 2))
    torch.testing.assert_close(tap.moments[0].mean, expected.mean)
    torch.testing.assert_close(tap.moments[0].var, expected.var)


def test_never_trained_is_true_only_for_the_statistics_of_new_layers() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(2, affine=False)).eval()
    assert never_trained(net)
    net[1].running_mean[1] = 0.1
    assert not never_trained(net)


def test_distance_is_that_of_the_median_channel_over_all_batches() -> None:
    x = draw(40, 3, 5, 5) * torch.tensor([1.0, 3.0, 9.0]).view(1, 3, 1, 1) + 2
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).eval()
    net[0].running_mean.copy_(torch.tensor([1.9, 5.0, 2.0]))  # 0.1, 1 and 0 deviations away
    net[0].running_var.copy_(torch.tensor([1.0, 9.0, 81.0 * math.e**4]))  # the last is too wide by e^2
    net[1].running_mean[:] = math.nan
    meter = DistanceMeter()
    with tap_batchnorm(net) as tap:
        for batch in x.split(16):  # the last one has fewer images
            net(batch)
            meter.add(tap)
    first, second = meter.distances()
    assert first == pytest.approx(1, abs=0.05)
    assert second == math.inf


def test_pool_and_batch_equal_statistics_of_the_pixels() -> None:
    x, labels = draw(6, 3, 4, 5), torch.tensor([0, 0, 2, 2, 2, 1])
    keep = torch.tensor([True, True, True, False, True, False])
    present, shares = class_averaging_matrix(labels, keep)
    assert present.tolist() == [0, 2]
    mean, std = Moments.of(x).pool(shares)
    pooled = [(mean[0], std[0], x[[0, 1]]), (mean[1], std[1], x[[2, 4]])]
    vectors = x[:, :, 0, 0]
    for mean, std, members in [*pooled, (*Moments.of(x).batch(), x), (*Moments.of(vectors).batch(), vectors)]:
        axes = (0, *range(2, members.dim()))
        torch.testing.assert_close(mean, members.mean(axes))
        torch.testing.assert_close(std, members.std(axes, correction=0))


def test_moments_have_the_gradient_of_their_formulas() -> None:
    x, weights = draw(6, 3, 4, 5).add(2).requires_grad_(), draw(2, 6, 3, seed=1)
    mean, var = x.mean((2, 3)), x.var((2, 3), correction=0)
    (expected,) = torch.autograd.grad((weights[0] * mean + weights[1] * var).sum(), x)
    moments = Moments.of(x)
    (gradient,) = torch.autograd.grad((weights[0] * moments.mean + weights[1] * moments.var).sum(), x)
    torch.testing.assert_close(moments.var, var, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, expected)
    half = x.detach().bfloat16().requires_grad_()
    Moments.of(half).var.sum().backward()
    assert half.grad.dtype == torch.bfloat16


def test_moments_of_many_images_are_those_of_each_image() -> None:
    x = images(300).repeat(1, 1, 4, 4)  # more than are computed together
    whole, each = Moments.of(x), [Moments.of(image) for image in x.split(1)]
    torch.testing.assert_close(whole.mean, torch.cat([moments.mean for moments in each]))
    torch.testing.assert_close(whole.var, torch.cat([moments.var for moments in each]))


def test_tap_records_the_last_pass_and_leaves_no_hook() -> None:
    net = make_net("residual")
    with tap_batchnorm(net) as tap:
        net(images(4))
        net(images(4))
        assert len(tap.moments) == len(batchnorm_layers(net))
        first = net.stem[0](images(4))  # type: ignore[union-attr, operator, index]
        assert tap.from_depth(0.5).layers == tap.layers[len(tap.layers) // 2 :]
    torch.testing.assert_close(tap.moments[0].mean, first.mean((2, 3)))
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in net.modules())


@pytest.mark.parametrize("affine", [True, False])
def test_tapped_batchnorm_keeps_outputs_and_gradients(affine: bool) -> None:
    norm = nn.BatchNorm2d(3, affine=affine).eval()
    for seed, value in enumerate(norm.state_dict().values()):
        if value.is_floating_point():
            value.copy_(draw(3, seed=seed).abs() + 0.5)
    x = draw(6, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, (mean_weight, var_weight) = draw(6, 3, 4, 5, seed=1), draw(2, 6, 3, seed=2)
    y = norm(x)
    total = (weight * y).sum() + (mean_weight * x.mean((2, 3)) + var_weight * x.var((2, 3), correction=0)).sum()
    (expected,) = torch.autograd.grad(total, x)
    with tap_batchnorm(norm) as tap:
        tapped = norm(x)
    (moments,) = tap.moments
    total = (weight * tapped).sum() + (mean_weight * moments.mean + var_weight * moments.var).sum()
    assert torch.equal(tapped, y)
    torch.testing.assert_close(torch.autograd.grad(total, x)[0], expected)
    assert "forward" not in vars(norm)


def test_tap_keeps_the_forward_of_a_batchnorm_subclass() -> None:
    class Rectified(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).relu()

    net, x = Rectified(3).eval(), draw(2, 3, 4, 4)
    expected = net(x)
    with tap_batchnorm(net) as tap:
        assert torch.equal(net(x), expected)
    torch.testing.assert_close(tap.moments[0].mean, x.mean((2, 3)))
    assert not net._forward_pre_hooks


def test_batchnorm_layers_refuses_a_net_without_any() -> None:
    with pytest.raises(NoBatchNormError, match="no BatchNorm layer"):
        batchnorm_layers(nn.Sequential(nn.Conv2d(3, 3, 1)))


def test_bns_loss_is_zero_for_the_statistics_in_the_buffers() -> None:  # (9)
    x, net = draw(64, 3, 8, 8), nn.BatchNorm2d(3, eps=1e-12).eval()
    net.running_mean, net.running_var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    with tap_batchnorm(net) as tap:
        net(x)
        assert float(bns_loss(tap)) < 1e-10
        net(2 * x + 1)
    mean_shift, std = (2 * x + 1).mean((0, 2, 3)) - x.mean((0, 2, 3)), x.std((0, 2, 3), correction=0)
    torch.testing.assert_close(bns_loss(tap), mean_shift.square().mean() + std.square().mean())
    torch.testing.assert_close(bns_loss(tap, relative=True), (mean_shift / std).square().mean() + 1)
    torch.testing.assert_close(bns_loss(Tap(tap.layers * 3, tap.moments * 3), 0.5, 1.5), 3 * bns_loss(tap))


def test_centroids_start_from_the_first_batch_and_follow_by_beta() -> None:  # (5)
    centroids = Centroids(3, torch.device("cpu"))
    first, second = draw(4, 2, 3, 3), draw(4, 2, 3, 3, seed=1)
    centroids.update([Moments.of(first)], *matrix(0, 0, 2, 2), 0.2)
    assert centroids.seen.tolist() == [True, False, True]
    torch.testing.assert_close(centroids.mean[0][2], first[2:].mean((0, 2, 3)))
    keep = torch.tensor([True, True, False, False])
    centroids.update([Moments.of(second)], *class_averaging_matrix(torch.tensor([0, 0, 2, 2]), keep), 0.2)
    expected = 0.8 * first[:2].mean((0, 2, 3)) + 0.2 * second[:2].mean((0, 2, 3))
    torch.testing.assert_close(centroids.mean[0][0], expected)
    torch.testing.assert_close(centroids.mean[0][2], first[2:].mean((0, 2, 3)))  # discarded samples move nothing


def test_sfda_loss_is_the_distance_to_the_centroid_of_the_class() -> None:  # (4)
    norm, (present, shares) = nn.BatchNorm2d(2), matrix(0, 0, 1, 1)
    norm.running_var = torch.tensor([1.0, 9.0])
    centroids, tap = Centroids(2, torch.device("cpu")), Tap([norm], [Moments.of(draw(4, 2, 3, 3))])
    centroids.update(tap.moments, present, shares, 0.2)
    assert float(sfda_loss(tap, centroids, present, shares)) < 1e-12
    centroids.mean[0][1] += torch.tensor([1.0, 3.0])
    torch.testing.assert_close(sfda_loss(tap, centroids, present, shares), torch.tensor(2.5))
    torch.testing.assert_close(sfda_loss(tap, centroids, present, shares, relative=True), torch.tensor(0.5))


def test_icv_loss_is_the_distance_to_a_noisy_centroid() -> None:  # (6)
    centroids, (present, shares) = Centroids(1, torch.device("cpu")), matrix(0, 0)
    centroids.update([Moments.of(draw(2, 2, 4, 4))], present, shares, 0.2)
    statistics, stds = [(centroids.mean[0], centroids.std[0])], [torch.tensor([2.0, 4.0])]
    noise = [(torch.ones(1, 2), torch.zeros(1, 2))]
    loss = icv_loss(statistics, centroids, present, stds, noise, 0.5, 1.0)
    torch.testing.assert_close(loss, torch.tensor((1.0**2 + 2.0**2) / 2))
    loss = icv_loss(statistics, centroids, present, stds, noise, 0.5, 1.0, relative=True)
    torch.testing.assert_close(loss, torch.tensor(0.25))


@pytest.mark.parametrize(
    ("features", "expected"),
    [((0, 0, 4, 4), 0), ((0, 4, 0, 4), 1), ((0, 2, 4, 6), 0.2)],  # total 5, within 1
)
def test_within_class_diversity_is_the_share_of_variance(features: tuple[int, ...], expected: float) -> None:
    values = torch.tensor(features).float()[:, None]
    assert within_class_diversity(values, torch.tensor([0, 0, 1, 1])) == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(19, 3, 7, 9), (2, 1, 2, 5), (1, 1, 1, 1)])
def test_total_variation_has_the_value_and_gradient_of_its_equation(shape: tuple[int, ...]) -> None:
    assert float(total_variation(torch.arange(4.0).expand(1, 1, 4, 4))) == 1.0
    assert torch.autograd.gradcheck(total_variation, draw(*shape).double().requires_grad_())


def test_image_variance_loss_is_large_for_images_that_are_alike_and_small_for_varied_ones() -> None:
    net = make_net("residual")
    alike = images(1).expand(16, -1, -1, -1)
    varied = images(16) * torch.linspace(0.2, 4, 16).view(-1, 1, 1, 1)
    with tap_batchnorm(net) as tap:
        net(alike)
        shortfall = float(image_variance_loss(tap, 0.08, 0.03))
        assert shortfall == pytest.approx(2 * len(tap.layers), rel=1e-3)
        net(varied)
        assert float(image_variance_loss(tap, 1e-4, 1e-4)) < 0.05 * shortfall
        net(varied.requires_grad_())
        image_variance_loss(tap, 10.0, 10.0).backward()
    assert float(varied.grad.abs().sum()) > 0
