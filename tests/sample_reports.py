"""Reports to test with: a run of resnet18 that measured everything, and changes of it."""

import math
from typing import Any

from pydantic import BaseModel

from clusterq_deploy.results.report import (
    Accuracy,
    Artifact,
    CalibrationInfo,
    Environment,
    EvaluationInfo,
    FeatureInfo,
    FeatureSet,
    Histogram,
    Latency,
    LayerHistograms,
    LayerNote,
    LayerSensitivity,
    ModelInfo,
    Points,
    Projection,
    Report,
    Skipped,
    Variant,
)

CPU, TENSORRT = "onnxruntime-cpu", "tensorrt"
TIMES = "\N{MULTIPLICATION SIGN}"
DASH = "\N{EN DASH}"

ENVIRONMENT = Environment(
    python="3.11.9",
    torch="2.13.0",
    torchvision="0.28.0",
    onnx="1.23.2",
    onnxruntime="1.31.1",
    tensorrt="10.9.0",
    cuda="13.0",
    driver="580.65.06",
    gpu="NVIDIA L4",
    cpu="AMD EPYC 9354P",
    cpu_int8=["avx512_vnni"],
    cores=2,
    memory_bytes=16 * 2**30,
    platform="Linux-6.8-x86_64",
)


def accuracy(runtime: str, top1: float, agreement: float, graph: str | None = None) -> Accuracy:
    return Accuracy(runtime=runtime, top1=top1, top5=top1 + 19.5, agreement=agreement, graph=graph)


def latency(runtime: str, batch: int, median_ms: float, graph: str, variation: float = 0.012) -> Latency:
    return Latency(
        runtime=runtime,
        batch=batch,
        threads=2 if runtime == CPU else None,
        runs=200,
        mean_ms=median_ms * 1.01,
        median_ms=median_ms,
        p90_ms=median_ms * 1.04,
        p95_ms=median_ms * 1.06,
        p99_ms=median_ms * 1.15,
        coefficient_of_variation=variation,
        images_per_second=1000 * batch / median_ms,
        graph=graph,
        quantiles_ms=[median_ms * (0.95 + 0.005 * step) for step in range(21)],
    )


def histograms(bits: int) -> list[LayerHistograms]:
    """Return those of two layers: weights on a signed grid, inputs on an unsigned one, of which a fifth is clipped."""
    half, levels = 1 << bits - 1, 1 << bits
    shared = {"width": levels / 32}
    weight = Histogram(
        low=-half, high=half - 1, steps=(0.01, 0.03), start=-half - 0.5, counts=[9] * 32, clipped=0.0, **shared
    )
    read = Histogram(low=0, high=levels - 1, steps=(0.25, 0.25), start=-0.5, counts=[8] * 40, clipped=0.2, **shared)
    return [LayerHistograms(layer=name, weight=weight, activation=read) for name in ("conv1", "layer1.10.conv2")]


def sensitivities(*kls: float, prefix: str = "layer1") -> list[LayerSensitivity]:
    return [
        LayerSensitivity(layer=f"{prefix}.{n}.conv2", bits="w4a4", kl=kl, agreement=99.5, expected_drop=0.01 / (n + 1))
        for n, kl in enumerate(kls)
    ]


def variant(name: str, scores: tuple[float, float], times: tuple[float, float], mb: float, **more: Any) -> Variant:
    """`scores` are top-1 and agreement in percent, `times` medians on CPU and in TensorRT in ms."""
    (top1, agreement), (cpu_ms, gpu_ms) = scores, times
    graph, engine = f"{name}/model.ort.onnx", f"{name}/model.engine"
    artifacts = [
        Artifact(kind="onnx", target="onnxruntime", path=graph, size_bytes=int(mb * 1e6)),
        Artifact(kind="onnx", target="tensorrt", path=f"{name}/model.trt.onnx", size_bytes=int(mb * 1e6) + 9_000),
        Artifact(kind="engine", target="tensorrt", path=engine, size_bytes=int(mb * 1.1e6), notes=["TensorRT 10.9"]),
    ]
    if name == "w4a4":
        path = "w4a4/model.int4.onnx"
        artifacts.append(Artifact(kind="onnx", target="int4", path=path, size_bytes=6_100_000, notes=["opset 21"]))
    values: dict[str, Any] = {
        "accuracy": [
            accuracy("torch", top1, agreement),
            accuracy(CPU, top1 - 0.02, agreement - 0.04, graph),
            accuracy(TENSORRT, top1 + 0.01, agreement - 0.02, engine),
        ],
        "latency": [
            latency(CPU, 1, cpu_ms, graph),
            latency(CPU, 32, cpu_ms * 29, graph, variation=0.041),
            latency(TENSORRT, 1, gpu_ms, engine),
            latency(TENSORRT, 32, gpu_ms * 9, engine),
        ],
        "skipped_layers": [LayerNote(layer="layer4.1.avgpool", reason="no weights")] if name == "w4a4" else [],
    }
    if name != "fp32":
        values["quantized_layers"] = 21
        values["losses"] = {"distillation": [2 * math.exp(-step / 40) + 0.31 for step in range(400)]}
        values["histograms"] = histograms(int(name[1]))
    return Variant(name=name, seconds=412.5, artifacts=artifacts, **values | more)


FP32 = variant("fp32", (69.76, 100.0), (15.104, 1.021), 46.75)
W8A8 = variant("w8a8", (69.52, 98.3), (4.604, 0.412), 11.84)
W4A4 = variant("w4a4", (66.18, 86.44), (4.655, 0.409), 11.83)


def points(count: int, shift: float) -> Points:
    """Return images of twelve classes around a circle."""
    labels = [index % 12 for index in range(count)]
    x = [round(30 * math.cos(label / 2) + shift, 2) for label in labels]
    return Points(x=x, y=[round(30 * math.sin(label / 2), 2) for label in labels], labels=labels)


FEATURES = FeatureInfo(
    width=512,
    synthetic=FeatureSet(
        dataset="synthetic images",
        images=1024,
        classes=100,
        silhouette=0.4213,
        within_class_diversity=0.2871,
        points=points(60, 0.5),
    ),
    real=FeatureSet(
        dataset="imagenet-val",
        images=2000,
        classes=100,
        silhouette=0.3056,
        within_class_diversity=0.4102,
        points=points(48, -0.5),
    ),
    density=0.912,
    coverage=0.8345,
    projection=Projection(method="t-SNE", parameters={"perplexity": 30.0, "init": "pca", "random_state": 7}),
)
_REPORT = Report(
    command=["clusterq", "run", "resnet18", "--data", "/data/imagenet val"],
    seed=7,
    created="2025-11-03T14:02:11+00:00",
    clusterq_deploy="0.1.0",
    environment=ENVIRONMENT,
    model=ModelInfo(name="resnet18", parameters=11_689_512, input_size=(3, 224, 224), classes=1000),
    calibration=CalibrationInfo(
        images=1024,
        seconds=815.2,
        teacher_top1=99.41,
        recipe="default",
        within_class_diversity=0.382,
        silhouette=0.4213,
        losses={
            "total": [9 * math.exp(-step / 300) + 1.1 for step in range(2000)],
            "ce": [6 * math.exp(-step / 90) + 0.04 for step in range(2000)],
            "bns": [2.5 / (1 + step / 200) + 0.3 + 0.1 * math.sin(step) for step in range(2000)],
            "sfda": [1.2 / (1 + step / 400) for step in range(1600)],
        },
    ),
    evaluation=EvaluationInfo(dataset="imagenet-val", images=5000),
    variants=[FP32, W8A8, W4A4],
    skipped=[Skipped(stage="benchmark", reason="onnxruntime-cuda has no fast INT8 path of its own")],
    features=FEATURES,
    config={"seed": 7, "recipe": "default"},
)


def build(**changes: Any) -> Report:
    """Return the report with other values; a dict changes fields of a record."""
    values = {}
    for name, value in changes.items():
        record = getattr(_REPORT, name)
        nested = isinstance(value, dict) and isinstance(record, BaseModel)
        values[name] = record.model_copy(update=value) if nested else value
    return _REPORT.model_copy(update=values)


def with_latency(own: Variant, runtime: str | None = None, **changes: Any) -> Variant:
    """Return a variant with other values in its latencies, in one runtime or in all."""
    timed = [e.model_copy(update=changes) if runtime in (None, e.runtime) else e for e in own.latency]
    return own.model_copy(update={"latency": timed})


def unlabelled(**changes: Any) -> Report:
    """Return the report of a run without labels."""
    blank = {"top1": None, "top5": None}
    variants = [
        own.model_copy(update={"accuracy": [a.model_copy(update=blank) for a in own.accuracy]})
        for own in _REPORT.variants
    ]
    return build(evaluation={"labelled": False}, variants=variants, **changes)


def with_half(half_ms: float, engine_fp16: bool = False) -> Report:
    """Return the report of a run that built and timed the float model in FP16."""
    graph = "fp32/model.fp16.engine"
    artifact = Artifact(kind="engine", target="tensorrt", path=graph, size_bytes=24_000_000, fp16=True)
    fp32 = FP32.model_copy(
        update={
            "accuracy": [*FP32.accuracy, accuracy(TENSORRT, 69.74, 99.9, graph)],
            "artifacts": [*FP32.artifacts, artifact],
            "latency": [*FP32.latency, *(latency(TENSORRT, n, half_ms * t, graph) for n, t in ((1, 1), (32, 9)))],
        }
    )
    others = [
        own.model_copy(update={"artifacts": [a.model_copy(update={"fp16": engine_fp16}) for a in own.artifacts]})
        for own in (W8A8, W4A4)
    ]
    return build(variants=[fp32, *others])
