"""Dead leaves: what they are like, and what fine-tuning does with them."""

import copy

import pytest
import torch
from nets import images, make_net

from calib.calibration_set import CalibrationSet
from calib.leaves import dead_leaves, leaves_beside, with_leaves
from clusterq_deploy.quantization import BitWidths, FinetuneConfig, finetune, make_student, post_training_quantize
from clusterq_deploy.quantization.qat.finetune import distillation_loss


@pytest.mark.parametrize("shape", [(5, 3, 96, 64), (3, 1, 28, 28), (2, 4, 16, 40), (33, 3, 8, 8)])
def test_they_are_images_of_any_shape_and_come_from_the_generator(shape: tuple[int, int, int, int]) -> None:
    first, again, other = (dead_leaves(shape, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.shape == shape
    assert first.dtype == torch.float32
    assert 0 <= first.min() < first.max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float((first[0] - first[1]).abs().mean()) > 0.01, "an image is like its neighbour"


def test_their_amplitudes_fall_with_frequency_as_those_of_photographs() -> None:
    """As 1/f to a power of 0.8 to 1.6: of white noise that is 0, of photographs about 1."""
    grey = dead_leaves((32, 3, 128, 128), torch.Generator().manual_seed(0)).mean(1)
    power = torch.fft.fft2(grey - grey.mean((1, 2), keepdim=True)).abs().square().mean(0)
    axis = torch.fft.fftfreq(128)
    frequency = torch.hypot(axis[:, None], axis[None])
    low, high = (power[(frequency > at / 1.2) & (frequency < at * 1.2)].mean() for at in (0.04, 0.32))
    exponent = float(torch.log(low / high) / torch.log(torch.tensor(8.0)) / 2)
    assert 0.8 < exponent < 1.6


def test_they_are_a_share_of_the_whole_in_the_images_own_range() -> None:
    own = 3 * images(30) + 1
    leaves = leaves_beside(own, 0.25, torch.Generator().manual_seed(0))
    assert len(leaves) == 10
    for channel in range(own.shape[1]):
        black, white = own[:, channel].min(), own[:, channel].max()
        assert black - 1e-4 <= leaves[:, channel].min() < black + 0.1 * (white - black)
        assert white + 1e-4 >= leaves[:, channel].max() > white - 0.1 * (white - black)
    whole = with_leaves(own, 0.25, torch.Generator().manual_seed(0))
    rows = [next(i for i, one in enumerate(whole) if torch.equal(one, image)) for image in torch.cat([own, leaves])]
    assert sorted(rows) == list(range(40))
    assert rows != sorted(rows)
    assert with_leaves(own, 0.01, torch.Generator()) is own


def test_they_are_tuned_on() -> None:
    net, data = make_net("residual"), images(48, seed=3)
    calibration = CalibrationSet(data, net(data).argmax(1))
    start = make_student(net, BitWidths(3, 3))
    reference = post_training_quantize(start, data, batch_size=16, rng=torch.Generator().manual_seed(0)).reference
    losses = []
    for share in (0.0, 0.5):
        config = FinetuneConfig(steps=8, batch_size=16, procedural=share)
        student, rng = copy.deepcopy(start), torch.Generator().manual_seed(0)
        losses.append(finetune(student, reference, calibration, config=config, flip=False, rng=rng).losses)
    assert losses[0]["distillation"] != losses[1]["distillation"]
    assert losses[0]["held_out_kl"][0] == losses[1]["held_out_kl"][0], "selection sees none of them"


def test_images_of_no_class_do_not_count_in_the_cross_entropy() -> None:
    logits, labels = torch.randn(6, 10), torch.tensor([3, -1, 7, -1, -1, 0])
    config = FinetuneConfig(ce_weight=1.0, kl_weight=0.0)
    known = labels >= 0
    torch.testing.assert_close(
        distillation_loss(logits, logits, labels, config),
        distillation_loss(logits[known], logits[known], labels[known], config),
    )
    assert float(distillation_loss(logits, logits, torch.full((6,), -1), config)) == 0
