"""Published accuracies for the tables of docs/accuracy.md. Top-1 in percent, drops in points."""

from dataclasses import dataclass

CLUSTERQ = "ClusterQ, arXiv 2205.00179"
TEXQ = "TexQ, NeurIPS 2023"
SYNQ = "SynQ, ICLR 2025"
ADADFQ = "AdaDFQ, CVPR 2023"
GENIE = "Genie, CVPR 2023"


@dataclass(frozen=True)
class Published:
    """A published number, and how far it is comparable; None is not published.

    `stated_drop` is for papers without both FP32 and top-1.
    """

    model: str
    bits: str
    first_last: bool
    source: str
    comparable: str
    network: str
    fp32: float | None = None
    top1: float | None = None
    stated_drop: float | None = None

    @property
    def drop(self) -> float | None:
        """In points."""
        if self.fp32 is None or self.top1 is None:
            return self.stated_drop
        return self.fp32 - self.top1


_CIFAR10 = (
    "Setting yes (all layers). Another FP32 checkpoint, 10,000 test images for our 5,000, finer grid (asymmetric): "
    "compare drops, not top-1."
)
_CIFAR100 = (
    "Setting yes (all layers). Another FP32 checkpoint of a slightly different ResNet-20, 10,000 test images for our "
    "2,500, finer grid (asymmetric): compare drops, not top-1."
)
_RESNET18 = (
    "No: all layers at 4 bits, ours keep 8 bits in the first and last. Another FP32 checkpoint, and 50,000 images for "
    "our 650."
)
_GENIE = (
    "Setting yes (first and last layers 8 bits): compare drops, with care. Our weights were product-quantized before, "
    "with BatchNorm statistics re-estimated on real images, and are measured on 650 easy images for 50,000."
)
_MOBILENET = (
    "No: MobileNetV2 at full width, all layers at 4 bits. Ours is MobileNetV1 at a quarter of the width, with 8 "
    "bits in the first and last layers."
)

PUBLISHED = (
    Published("resnet20_cifar10", "w4a4", True, CLUSTERQ, _CIFAR10, "ResNet-20", 93.89, 92.06),
    Published("resnet20_cifar10", "w4a4", True, TEXQ, _CIFAR10, "ResNet-20", stated_drop=1.21),
    Published("resnet20_cifar10", "w4a4", True, SYNQ, _CIFAR10, "ResNet-20", stated_drop=1.13),
    Published("resnet20_cifar10", "w3a3", True, ADADFQ, _CIFAR10, "ResNet-20", top1=84.89),
    Published("resnet20_cifar10", "w3a3", True, SYNQ, _CIFAR10, "ResNet-20", top1=88.11, stated_drop=5.78),
    Published("resnetsmall20_cifar100", "w4a4", True, CLUSTERQ, _CIFAR100, "ResNet-20", 70.33, 67.09),
    Published("resnetsmall20_cifar100", "w4a4", True, SYNQ, _CIFAR100, "ResNet-20", stated_drop=2.99),
    Published("mobilenet_v1_025", "w4a4", True, CLUSTERQ, _MOBILENET, "MobileNetV2", 73.03, 63.33),
    Published("mobilenet_v1_025", "w4a4", True, SYNQ, _MOBILENET, "MobileNetV2", top1=67.27),
    Published("resnet18_pqf", "w4a4", True, CLUSTERQ, _RESNET18, "ResNet-18", 71.47, 64.39),
    Published("resnet18_pqf", "w4a4", True, SYNQ, _RESNET18, "ResNet-18", top1=67.90),
    Published("resnet18_pqf", "w4a4", False, GENIE, _GENIE, "ResNet-18", stated_drop=1.3),
)
