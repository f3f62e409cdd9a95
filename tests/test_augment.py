"""Views of images: what changes, what stays, and that a seed repeats them."""

import pytest
import torch
from nets import images
from support import seeded

from clusterq_deploy.quantization.qat.augment import AugmentConfig, Augmenter

NOTHING = {"zoom": 0.0, "rotation": 0.0, "translation": 0.0, "jitter": 0.0, "cutmix": 0.0}


def views(*, flip: bool = False, seed: int = 0, **changes: float) -> tuple[torch.Tensor, torch.Tensor]:
    own = images(16).clamp(-2, 2)
    rng = seeded(seed)
    return own, Augmenter(AugmentConfig(**{**NOTHING, **changes}), own, flip=flip, rng=rng)(own)


def test_augmenter_without_changes_returns_images() -> None:
    own, view = views()
    assert torch.equal(own, view)


@pytest.mark.parametrize("change", ["zoom", "rotation", "translation", "jitter"])
def test_augmenter_changes_each_image_within_pixel_range(change: str) -> None:
    own, view = views(**{change: 0.3})
    assert view.shape == own.shape
    assert float(view.abs().max()) <= 2 + 1e-5
    distance = (view - own).square().mean((1, 2, 3))
    assert len(distance.unique()) == 16
    assert float(distance.min()) > 0


def test_augmenter_mirrors_some_images() -> None:
    own, view = views(flip=True)
    kept = [torch.allclose(a, b, atol=1e-4) for a, b in zip(own, view, strict=True)]
    mirrored = [torch.allclose(a.flip(-1), b, atol=1e-4) for a, b in zip(own, view, strict=True)]
    assert all(k != m for k, m in zip(kept, mirrored, strict=True))
    assert any(kept)
    assert any(mirrored)


def test_augmenter_cutmix_pastes_from_batch() -> None:
    own, view = views(cutmix=1.0, seed=2)
    changed = (view != own).any(1)
    assert 0 < int(changed.sum()) < changed.numel()
    rows, columns = changed.any(0).any(1).nonzero(), changed.any(0).any(0).nonzero()
    top, bottom, left, right = int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1
    pool = own[:, :, top:bottom, left:right].flatten(1)
    for patch in view[:, :, top:bottom, left:right].flatten(1):
        assert any(torch.equal(patch, other) for other in pool)


def test_augmenter_repeats_views_by_seed() -> None:
    settings = {"zoom": 0.2, "rotation": 0.2, "translation": 0.1, "jitter": 0.3, "cutmix": 0.5}
    first, again, other = (views(flip=True, seed=seed, **settings)[1] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
