"""Classifiers of torchvision and timm with random weights, which need no download and no licence.

BatchNorm statistics are those of natural noise, and the last layer is fitted to groups of it, so that logits differ as
much as a trained model's.
"""

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from calib.refine import natural_noise
from clusterq_deploy.models import LoadedModel, load_model
from clusterq_deploy.models.registry import torchvision_cfg
from clusterq_deploy.quantization import BitWidths, Student, calibrate, make_student
from clusterq_deploy.quantization.sensitivity import answers

MODELS = (
    "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "vgg16_bn", "mobilenet_v2", "mobilenet_v3_small",
    "mobilenet_v3_large", "mnasnet1_0", "shufflenet_v2_x1_0", "densenet121", "efficientnet_b0", "efficientnet_v2_s",
    "regnet_y_400mf", "regnet_x_400mf", "googlenet", "inception_v3", "leaky_resnet18",
)  # fmt: skip
FAMILIES = tuple(f"timm:{name}" for name in (
    "resnet18d", "resnet26t", "resnetblur50", "seresnet33ts", "eca_resnet33ts", "gcresnet33ts", "resnetrs50",
    "seresnext26d_32x4d", "skresnet18", "resnest14d", "res2net50_14w_8s", "regnetx_002", "regnety_002", "regnetz_005",
    "gernet_s", "repvgg_a0", "mobileone_s0", "fastvit_t8", "repvit_m0_9", "repghostnet_050", "ghostnet_050",
    "ghostnetv2_100", "mobilenetv1_100", "mobilenetv2_050", "mobilenetv3_small_050", "mobilenetv4_conv_small",
    "mobilenet_edgetpu_v2_xs", "efficientnet_b0", "efficientnet_lite0", "tf_efficientnet_b0", "mixnet_s",
    "tinynet_e", "lcnet_050", "rexnet_100", "hardcorenas_a", "fbnetc_100", "fbnetv3_b", "spnasnet_100", "mnasnet_small",
    "dla34", "hrnet_w18_small", "selecsls42b", "ese_vovnet19b_dw", "vovnet39a", "xception41", "legacy_xception",
    "cspresnet50", "cspdarknet53", "darknet53", "cs3darknet_s", "densenet121", "dpn48b", "inception_v4",
    "inception_resnet_v2", "nasnetalarge", "pnasnet5large", "vgg11_bn", "hgnetv2_b0", "convmixer_768_32", "starnet_s1",
    "tresnet_m", "levit_128s", "levit_conv_128s", "efficientvit_b0", "efficientvit_m0", "mobilevit_xxs",
    "mobilevitv2_050", "visformer_tiny", "tiny_vit_5m_224", "shvit_s1", "swiftformer_xs",
    "halonet26t", "lambda_resnet26t", "botnet26t_256",
))  # fmt: skip
"""One of timm's models, mostly the smallest, per family of architectures with BatchNorm."""
SEED = 0
CALIBRATED = 32
_GROUPS, _FITTED, _BATCH = 20, 256, 16
_SMALL = (3, 96, 96)  # of an image for timm's models that are not made for one size
_SIZES = {"timm:halonet26t": (3, 256, 256)}  # others that a model needs, here for blocks of 8 x 8 in its last maps
_FEW = 40
_RIDGE = 0.3


def leaky_resnet18() -> nn.Module:
    """Make a ResNet-18 with LeakyReLU in place of ReLU."""
    net: nn.Module = torchvision.models.resnet18(weights=None)
    vars(net)["pretrained_cfg"] = torchvision_cfg("resnet18")
    for block in list(net.modules()):
        for name, child in block.named_children():
            if isinstance(child, nn.ReLU):
                setattr(block, name, nn.LeakyReLU(0.1))
    return net


def groups_of_noise(count: int, size: tuple[int, int, int], rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw images (N, C, H, W) in groups that share most of their noise; return them and the groups (N,)."""
    centres = natural_noise(torch.Size((_GROUPS, *size)), torch.Generator().manual_seed(SEED))
    labels = torch.arange(count) % _GROUPS
    return 0.97 * centres[labels] + 0.24 * natural_noise(torch.Size((count, *size)), rng), labels


def settle(model: nn.Module, size: tuple[int, int, int], rng: torch.Generator, count: int = _FITTED) -> None:
    """Set the statistics and the last layer of a random model, in place, similar to a trained one's, by `count` images.

    The last layer is a Linear or a convolution of one pixel that reads features (N, F) or (N, F, 1, 1).
    """
    images, labels = groups_of_noise(count, size, rng)
    for norm in (m for m in model.modules() if isinstance(m, _BatchNorm)):
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5, generator=rng)
            nn.init.normal_(norm.bias, 0, 0.3, generator=rng)
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    answers(model, images[:64], _BATCH)
    model.eval()
    last = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    inputs: list[Tensor] = []
    with last.register_forward_pre_hook(lambda _, args: inputs.append(args[0])):
        answers(model, images, _BATCH)
    features = torch.cat(inputs).flatten(1)
    mean = features.mean(0)
    centred = (features - mean).double()
    target = 10 * torch.eye(len(last.weight), dtype=torch.float64)[labels]
    gram = centred.T @ centred
    gram += _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    with torch.no_grad():
        last.weight.copy_(torch.linalg.solve(gram, centred.T @ target).T.view_as(last.weight))
        if last.bias is not None:
            last.bias.copy_(target.mean(0) - last.weight.double().flatten(1) @ mean.double())


def _has_one_size(name: str) -> bool:
    """Return whether a model of timm runs on images of its own size only."""
    import timm

    cfg = timm.get_pretrained_cfg(name.removeprefix("timm:"))
    return bool(cfg and cfg.fixed_input_size)


def settled(name: str, images: int) -> tuple[LoadedModel, Tensor]:
    """Make a random model with statistics, and images (N, C, H, W) for it."""
    rng = torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)
    has_factory = name == leaky_resnet18.__name__  # its weights are random
    source, weights = (f"{__file__}:{name}", None) if has_factory else (name, "none")
    small = _SIZES.get(name, _SMALL) if name in FAMILIES and not _has_one_size(name) else None
    model = load_model(source, weights=weights, input_size=small, device=torch.device("cpu"))
    settle(model.original, model.input.size, rng, _FEW if name in FAMILIES else _FITTED)
    return model, groups_of_noise(images, model.input.size, rng)[0]


def calibrated(model: LoadedModel, bits: BitWidths, seen: Tensor) -> Student:
    """Make a student whose scales come from the first images."""
    student = make_student(model.module, bits)
    rng = torch.Generator().manual_seed(SEED)
    calibrate(student, seen[:CALIBRATED], batch_size=_BATCH, rng=rng)
    return student
