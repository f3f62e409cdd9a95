"""The stages of a run, each on the files that the one before wrote; some take a single ONNX file too."""

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


_VERIFIED = 1000  # images of `export --verify`


def pipeline_of(ctx: click.Context, config: Any, out: Path) -> "Pipeline":
    """The pipeline of a run directory, with progress on the terminal."""
    from calib.support.progress import SILENT
    from cli.render import LiveProgress
    from clusterq_deploy.pipeline import Pipeline

    progress = LiveProgress(ctx.obj["quiet"])
    if not progress.shown:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # timm's downloads have bars of their own
    said = ["clusterq", *sys.argv[1:]]
    command = [
        os.fsencode(own).decode("utf-8", "backslashreplace") for own in said
    ]  # a report is UTF-8, no path has to be
    return Pipeline(config, out, progress=progress if progress.shown else SILENT, command=command)


def resume(ctx: click.Context, run: Path) -> "Pipeline":
    """The pipeline of an existing run directory, with the options of the command line on top of its run.toml."""
    from clusterq_deploy.config.toml import read_settings
    from clusterq_deploy.errors import RunDirectoryError
    from clusterq_deploy.run.manifest import CONFIG

    if not (run / CONFIG).is_file():
        if run.suffix in (".onnx", ".engine"):
            raise RunDirectoryError(f"{run} does not exist")
        raise RunDirectoryError(f"{run} is no run directory: it has no {CONFIG}; start one with clusterq synthesize")
    settings = read_settings(run / CONFIG)
    chosen = ctx.params.get("bits") or ()
    config = options.config_of(ctx, run / CONFIG)
    if chosen:  # earlier variants stay part of the run
        bits = [*settings.get("bits", []), *chosen]
        config = config.model_validate({**config.model_dump(), "bits": bits})
    return pipeline_of(ctx, config, run)


@contextmanager
def _resumed(ctx: click.Context, run: Path) -> Iterator["Pipeline"]:
    """The same, for a stage: once that is done, its options are part of the run's configuration."""
    pipeline = resume(ctx, run)
    yield pipeline
    pipeline.directory.write_config(pipeline.requested_config.to_toml())


def _options_alone(ctx: click.Context) -> "RunConfig":
    """The configuration that the options make where there is no run; of no real model, so only for what needs none."""
    from clusterq_deploy.config.run_config import make_config

    return make_config(options.overlay({"model": "digits"}, ctx))


def _variants(ctx: click.Context, pipeline: "Pipeline", stage: str) -> list[str]:
    """The variants that a command names, or all whose stage before is finished."""
    from clusterq_deploy.quantization import BitWidths

    if chosen := ctx.params.get("bits"):
        return [str(BitWidths.parse(text)) for text in chosen]
    finished = [v for v in pipeline.config.bits if pipeline.directory.finished(f"{stage}/{v}")]
    return finished or list(pipeline.config.bits)


@click.command()
@options.run_argument
@options.widths_options
@options.json_option
@click.pass_context
def sensitivity(ctx: click.Context, /, run: Path, as_json: bool, **_: Any) -> None:
    """Measure what the quantization of each layer of RUN's model costs, on synthetic images.

    Each layer is quantized alone, all others stay in float. The expected drop is what top-1 would lose, in points, if
    the model's own probabilities were the truth.
    """
    from cli import render
    from clusterq_deploy.quantization import BitWidths

    with _resumed(ctx, run) as pipeline:
        rows = [
            {"variant": str(bits), "layer": own.layer, "bits": own.bits, **own.cost.model_dump(mode="json")}
            for bits in map(BitWidths.parse, ctx.params["bits"] or pipeline.config.bits)
            for own in pipeline.sensitivity(bits).result.layers
        ]
    render.show(rows, as_json)


@click.command()
@options.run_argument
@options.quantize_options
@options.json_option
@click.pass_context
def quantize(ctx: click.Context, /, run: Path, as_json: bool, **_: Any) -> None:
    """Quantize and fine-tune the model of RUN on its calibration images."""
    from cli import render
    from clusterq_deploy.quantization import BitWidths

    with _resumed(ctx, run) as pipeline:
        rows = []
        for name in ctx.params["bits"] or pipeline.config.bits:
            bits = BitWidths.parse(name)
            record = pipeline.quantize(bits)
            result = record.result
            rows.append(
                {
                    "variant": str(bits),
                    "quantized_layers": result.quantized_layers,
                    "skipped_layers": len(result.skipped_layers),
                    "kept_step": result.kept_step,
                    "held_out_kl": min(result.losses["held_out_kl"], default=None),
                    "layers_of_other_bits": len(result.keep),
                    "expected_drop": result.expected_drop,
                    "file": next(iter(record.files)),
                }
            )
    render.show(rows, as_json)


@click.command()
@options.run_argument
@options.bits_option
@options.fp16_option
@click.option("--verify", is_flag=True, help="Hold the graphs against torch once more, on 1,000 synthetic images.")
@options.json_option
@click.pass_context
def export(ctx: click.Context, /, run: Path, verify: bool, as_json: bool, **_: Any) -> None:
    """Write and verify the ONNX graphs of RUN's variants, and of the float baseline.

    With --verify the integers at every quantizer are compared on as many synthetic images as there are, up to 1,000,
    and the first quantizer is named at which a graph and torch part; it ends with 1 where they do.
    """
    from cli import render
    from clusterq_deploy.run.run import FP32

    with _resumed(ctx, run) as pipeline:
        variants = _variants(ctx, pipeline, "quantize")
        rows = []
        for variant in [FP32, *variants]:
            record = pipeline.export(variant)
            rows += [
                {"variant": variant, **a.model_dump(mode="json", include={"target", "path", "size_bytes"})}
                for a in record.result.artifacts
            ]
    if not verify:
        render.show(rows, as_json)
        return
    compared = [
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
    render.show(compared, as_json)
    if any(row["parts_at"] for row in compared):
        ctx.exit(1)


@click.command()
@click.argument("target", type=click.Path(path_type=Path), metavar="RUN|FILE.onnx")
@options.bits_option
@options.build_options
@options.json_option
@click.pass_context
def build(ctx: click.Context, /, target: Path, as_json: bool, **_: Any) -> None:
    """Build TensorRT engines: of RUN's variants and baselines, or of one ONNX file, of any exporter (next to it).

    A file's engine is built once more in FP16 without quantizers, as MODEL.fp16.engine: what INT8 is compared with.
    Ctrl-C cancels a build; finished engines stay.
    """
    from cli import render
    from clusterq_deploy.errors import TensorRTMissing
    from clusterq_deploy.run.run import FP32
    from clusterq_deploy.runtimes import tensorrt as engine
    from clusterq_deploy.stages.build import build_file

    if reason := engine.unavailable_reason():
        raise TensorRTMissing(f"no engine can be built here: {reason}")
    if target.suffix == ".onnx":
        built = build_file(target, _options_alone(ctx).build, render.LiveProgress(ctx.obj["quiet"]))
        sizes = [(str(own), info.size_bytes, info.seconds) for own, info in built.items()]
        render.show([dict(zip(("engine", "size_bytes", "seconds"), own, strict=True)) for own in sizes], as_json)
        return
    with _resumed(ctx, target) as pipeline:
        records = {v: pipeline.build(v) for v in [FP32, *_variants(ctx, pipeline, "export")]}
    rows = [
        {
            "variant": variant,
            "engine": artifact.path,
            "size_bytes": artifact.size_bytes,
            "seconds": engine.read_sidecar(target / artifact.path).seconds,
        }
        for variant, record in records.items()
        if record
        for artifact in record.result.artifacts
    ]
    render.show(rows, as_json)


@click.command()
@click.argument("target", type=click.Path(path_type=Path), metavar="RUN|FILE")
@options.data_options
@options.bits_option
@options.json_option
@click.pass_context
def evaluate(
    ctx: click.Context, /, target: Path, data: Path | None, limit: int | None, as_json: bool, **_: Any
) -> None:
    """Measure accuracy as the runtimes execute it: of RUN's variants, or of one ONNX file or engine.

    With a file the engines beside it that were built from it are measured too.
    """
    from cli import render
    from clusterq_deploy.run.run import FP32
    from clusterq_deploy.stages.evaluate import evaluate_file

    if target.is_file():
        found, images = evaluate_file(target, data, limit, render.LiveProgress(ctx.obj["quiet"]))
        counts = {"images": len(images.kept), "unreadable": len(images.unreadable)}
        render.show([own.model_dump(mode="json", exclude={"agreement"}) | counts for own in found], as_json)
        return
    with _resumed(ctx, target) as pipeline:
        rows = [
            {"variant": variant, **entry.model_dump(mode="json")}
            for variant in [FP32, *_variants(ctx, pipeline, "export")]
            for entry in pipeline.evaluate(variant).result.accuracy
        ]
    render.show(rows, as_json)


@click.command()
@options.run_argument
@options.data_options
@options.json_option
@click.pass_context
def features(ctx: click.Context, /, run: Path, as_json: bool, **_: Any) -> None:
    """Compare the model's features of RUN's synthetic images with those of real ones, for the report."""
    from cli import render

    with _resumed(ctx, run) as pipeline:
        found = pipeline.features().result
    if found.features is None:
        rows = [{"skipped": found.skipped}]
    else:
        sets = {"synthetic": found.features.synthetic, "real": found.features.real}
        rows = [{"set": k, **v.model_dump(mode="json", exclude={"points"})} for k, v in sets.items() if v]
    render.show(rows, as_json)


@click.command()
@click.argument("target", type=click.Path(path_type=Path), metavar="RUN|FILE")
@options.benchmark_options
@options.json_option
@click.pass_context
def benchmark(ctx: click.Context, /, target: Path, as_json: bool, **_: Any) -> None:
    """Measure latency: of RUN's variants in turn, or of one ONNX file or engine.

    With a file the engines beside it that were built from it are timed too.
    """
    from cli import render
    from clusterq_deploy.results.stages import latency_values
    from clusterq_deploy.stages.benchmark import benchmark_file

    if target.is_file():
        timed = benchmark_file(target, _options_alone(ctx), render.LiveProgress(ctx.obj["quiet"]))
        rows = [latency_values(entry) for entry in timed]
    else:
        with _resumed(ctx, target) as pipeline:
            latency = pipeline.benchmark().result.latency
        rows = [{"variant": v, **latency_values(entry)} for v, entries in latency.items() for entry in entries]
    render.show(rows, as_json)


ALL: list[click.Command] = [sensitivity, quantize, export, build, evaluate, features, benchmark]
