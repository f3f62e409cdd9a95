"""The stages of a run, each on the files of earlier stages; some accept a single ONNX file too."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli import options

if TYPE_CHECKING:
    from clusterq_deploy.config.run_config import RunConfig
    from clusterq_deploy.pipeline import Pipeline
    from clusterq_deploy.runtimes.tensorrt import BuildConfig, EngineInfo

_VERIFIED = 1000  # images of `export --verify`
_Rows = list[dict[str, Any]]


def pipeline_of(ctx: click.Context, config: "RunConfig", out: Path) -> "Pipeline":
    """Return the pipeline of a run directory, with progress on the terminal."""
    from calib.support.progress import SILENT
    from cli.render import LiveProgress
    from clusterq_deploy.pipeline import Pipeline

    progress = LiveProgress(ctx.obj["quiet"])
    if not progress.shown:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of timm's downloads
    # a report is UTF-8, a path may not be
    command = [os.fsencode(word).decode("utf-8", "backslashreplace") for word in ("clusterq", *sys.argv[1:])]
    return Pipeline(config, out, progress=progress if progress.shown else SILENT, command=command)


def resume(ctx: click.Context, run: Path) -> "Pipeline":
    """Return the pipeline of an existing run directory; options of the command line override its run.toml."""
    from clusterq_deploy.config.run_config import make_config
    from clusterq_deploy.config.toml import read_settings
    from clusterq_deploy.errors import RunDirectoryError
    from clusterq_deploy.run.manifest import CONFIG

    file = run / CONFIG
    if not file.is_file():
        if run.suffix in (".onnx", ".engine"):
            raise RunDirectoryError(f"{run} does not exist")
        raise RunDirectoryError(f"{run} is not a run directory (no {CONFIG}); start one with clusterq synthesize")
    config = options.config_of(ctx, file)
    if ctx.params.get("bits"):  # earlier variants stay part of the run
        bits = dict.fromkeys([*make_config(read_settings(file)).bits, *config.bits])
        config = config.model_copy(update={"bits": tuple(bits)})
    return pipeline_of(ctx, config, run)


@contextmanager
def _resumed(ctx: click.Context, run: Path) -> Iterator["Pipeline"]:
    """Resume a run for a stage, and add the options to the run's configuration when the stage is done."""
    pipeline = resume(ctx, run)
    yield pipeline
    pipeline.directory.write_config(pipeline.requested_config.to_toml())


def _variants(ctx: click.Context, pipeline: "Pipeline", stage: str) -> list[str]:
    """Return the variants in --bits, else those with a finished `stage`, else all."""
    from clusterq_deploy.quantization import BitWidths

    if named := ctx.params.get("bits"):
        return [str(BitWidths.parse(text)) for text in named]
    finished = [variant for variant in pipeline.config.bits if pipeline.directory.finished(f"{stage}/{variant}")]
    return finished or list(pipeline.config.bits)


@options.command(options.run_argument, options.widths_options)
def sensitivity(ctx: click.Context, /, run: Path, **_: Any) -> _Rows:
    """Measure the cost of quantizing each layer of RUN's model, on synthetic images.

    One layer at a time is quantized, all others stay in float. The expected drop is the loss of top-1, in points, if
    the model's own probabilities were correct.
    """
    from clusterq_deploy.quantization import BitWidths

    with _resumed(ctx, run) as pipeline:
        return [
            {"variant": str(bits), "layer": layer.layer, "bits": layer.bits, **layer.cost.model_dump(mode="json")}
            for bits in map(BitWidths.parse, ctx.params["bits"] or pipeline.config.bits)
            for layer in pipeline.sensitivity(bits).result.layers
        ]


@options.command(options.run_argument, options.quantize_options)
def quantize(ctx: click.Context, /, run: Path, **_: Any) -> _Rows:
    """Quantize and fine-tune the model of RUN on its calibration images."""
    from clusterq_deploy.quantization import BitWidths

    with _resumed(ctx, run) as pipeline:
        widths = map(BitWidths.parse, ctx.params["bits"] or pipeline.config.bits)
        records = {str(bits): pipeline.quantize(bits) for bits in widths}
    return [
        {
            "variant": variant,
            "quantized_layers": record.result.quantized_layers,
            "skipped_layers": len(record.result.skipped_layers),
            "kept_step": record.result.kept_step,
            "held_out_kl": min(record.result.losses["held_out_kl"], default=None),
            "layers_of_other_bits": len(record.result.keep),
            "expected_drop": record.result.expected_drop,
            "file": next(iter(record.files)),
        }
        for variant, record in records.items()
    ]


@options.command(
    options.run_argument,
    options.bits_option,
    options.fp16_option,
    click.option("--verify", is_flag=True, help="Also compare the graphs with torch on 1,000 synthetic images."),
)
def export(ctx: click.Context, /, run: Path, verify: bool, as_json: bool, **_: Any) -> None:
    """Write and verify the ONNX graphs of RUN's variants, and of the float baseline.

    With --verify, the integers at every quantizer are compared on up to 1,000 synthetic images, and the table names the
    first quantizer at which a graph and torch differ; the exit code is 1 if there is one.
    """
    from cli import render
    from clusterq_deploy.run.run import FP32

    with _resumed(ctx, run) as pipeline:
        variants = _variants(ctx, pipeline, "quantize")
        records = {variant: pipeline.export(variant) for variant in [FP32, *variants]}
    rows = [
        {"variant": variant, **artifact.model_dump(mode="json", include={"target", "path", "size_bytes"})}
        for variant, record in records.items()
        for artifact in record.result.artifacts
    ]
    if verify:
        rows = [
            {
                "graph": path,
                "agreement": agreement,
                "quantizers": len(sites),
                "integers": sum(site.values for site in sites),
                "ties": sum(site.ties for site in sites),
                "parts_at": next((site.site for site in sites if site.differing), None),
            }
            for variant in variants
            for path, agreement, sites in pipeline.compare_graphs(variant, _VERIFIED)
        ]
    render.show(rows, as_json)
    if any(row.get("parts_at") for row in rows):
        ctx.exit(1)


@options.command(options.target_argument("RUN|FILE.onnx"), options.bits_option, options.build_options)
def build(ctx: click.Context, /, target: Path, **_: Any) -> _Rows:
    """Build TensorRT engines: of RUN's variants and baselines, or of one ONNX file, of any exporter (next to it).

    For a file, an FP16 engine without quantizers is also built, as MODEL.fp16.engine: the baseline for INT8.
    Ctrl-C cancels a build; finished engines are kept. With --rtx, engines of TensorRT-RTX are built too, as
    MODEL.rtx.engine, also where there is no GPU.
    """
    from cli.render import LiveProgress
    from clusterq_deploy.errors import TensorRTMissing
    from clusterq_deploy.run.run import FP32
    from clusterq_deploy.runtimes import tensorrt as engine
    from clusterq_deploy.stages.build import build_file

    def require_library(config: "BuildConfig") -> None:
        if not config.rtx and (reason := engine.unavailable_reason()):
            raise TensorRTMissing(f"no engine can be built here: {reason}")

    if target.suffix == ".onnx":
        config = options.config_of(ctx, model="digits").build  # a placeholder: the build has no model
        require_library(config)
        engines = build_file(target, config, LiveProgress(ctx.obj["quiet"]))
        return [{"engine": str(path), **_engine_figures(info)} for path, info in engines.items()]
    with _resumed(ctx, target) as pipeline:
        require_library(pipeline.config.build)
        variants = [FP32, *_variants(ctx, pipeline, "export")]
        records = [(variant, pipeline.build(variant)) for variant in variants]
        if pipeline.config.build.rtx:
            records += [(variant, pipeline.rtx(variant)) for variant in variants]
    return [
        {"variant": variant, "engine": built.path, **_engine_figures(engine.read_sidecar(target / built.path))}
        for variant, record in records
        if record
        for built in record.result.artifacts
    ]


def _engine_figures(info: "EngineInfo") -> dict[str, Any]:
    """Return the figures of an engine for a row; those of its plan are None for engines of TensorRT."""
    plan = info.plan.model_dump(include={"kernels", "convolutions_int8", "requantizations"}) if info.plan else {}
    moved = {"bytes_moved": info.plan.bytes_moved} if info.plan else {}
    return {"size_bytes": info.size_bytes, "seconds": info.seconds, **plan, **moved}


@options.command(options.target_argument("RUN|FILE"), options.data_options, options.bits_option)
def evaluate(ctx: click.Context, /, target: Path, data: Path | None, limit: int | None, **_: Any) -> _Rows:
    """Measure accuracy as the runtimes execute it: of RUN's variants, or of one ONNX file or engine.

    The engines next to a file that were built from it are measured too.
    """
    from cli.render import LiveProgress
    from clusterq_deploy.run.run import FP32
    from clusterq_deploy.stages.evaluate import evaluate_file

    if target.is_file():
        accuracies, images = evaluate_file(target, data, limit, LiveProgress(ctx.obj["quiet"]))
        counts = {"images": len(images.readable), "unreadable": len(images.unreadable)}
        return [entry.model_dump(mode="json", exclude={"agreement"}) | counts for entry in accuracies]
    with _resumed(ctx, target) as pipeline:
        return [
            {"variant": variant, **entry.model_dump(mode="json")}
            for variant in [FP32, *_variants(ctx, pipeline, "export")]
            for entry in pipeline.evaluate(variant).result.accuracy
        ]


@options.command(options.run_argument, options.data_options)
def features(ctx: click.Context, /, run: Path, **_: Any) -> _Rows:
    """Compare the model's features of RUN's synthetic images with those of real ones, for the report."""
    with _resumed(ctx, run) as pipeline:
        result = pipeline.features().result
    if result.features is None:
        return [{"skipped": result.skipped}]
    sets = {"synthetic": result.features.synthetic, "real": result.features.real}
    dumps = {name: images.model_dump(mode="json", exclude={"points"}) for name, images in sets.items() if images}
    return [{"set": name, **values} for name, values in dumps.items()]


@options.command(options.target_argument("RUN|FILE"), options.benchmark_options)
def benchmark(ctx: click.Context, /, target: Path, **_: Any) -> _Rows:
    """Measure latency: of RUN's variants in alternation, or of one ONNX file or engine.

    The engines next to a file that were built from it are timed too.
    """
    from cli.render import LiveProgress
    from clusterq_deploy.results.stages import latency_values
    from clusterq_deploy.stages.benchmark import benchmark_file

    if target.is_file():
        config = options.config_of(ctx, model="digits")  # a placeholder: the benchmark has no model
        return [latency_values(entry) for entry in benchmark_file(target, config, LiveProgress(ctx.obj["quiet"]))]
    with _resumed(ctx, target) as pipeline:
        latency = pipeline.benchmark().result.latency
    return [{"variant": variant, **latency_values(entry)} for variant, entries in latency.items() for entry in entries]


ALL: list[click.Command] = [sensitivity, quantize, export, build, evaluate, features, benchmark]
