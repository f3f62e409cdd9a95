"""Quantization: fold BatchNorm, place quantizers, set their scales, fine-tune."""

from clusterq_deploy.quantization.grid import BitWidths, Grid
from clusterq_deploy.quantization.histogram import histograms
from clusterq_deploy.quantization.ptq.calibrate import calibrate
from clusterq_deploy.quantization.ptq.equalize import equalize
from clusterq_deploy.quantization.ptq.ptq import PTQResult, post_training_quantize
from clusterq_deploy.quantization.ptq.reconstruct import correct_bias, fit_full_range_biases, reconstruct
from clusterq_deploy.quantization.qat.finetune import FinetuneConfig, Tuning, finetune
from clusterq_deploy.quantization.reference import FloatTwin
from clusterq_deploy.quantization.sensitivity import (
    PrecisionPlan,
    judged_views,
    plan_precision,
    sensitivities,
)
from clusterq_deploy.quantization.student import Student, load_student, make_student

__all__ = [
    "BitWidths",
    "FinetuneConfig",
    "FloatTwin",
    "Grid",
    "PTQResult",
    "PrecisionPlan",
    "Student",
    "Tuning",
    "calibrate",
    "correct_bias",
    "equalize",
    "finetune",
    "fit_full_range_biases",
    "histograms",
    "judged_views",
    "load_student",
    "make_student",
    "plan_precision",
    "post_training_quantize",
    "reconstruct",
    "sensitivities",
]
