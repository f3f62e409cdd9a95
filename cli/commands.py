"""The commands that need no run: what starts one, and what looks at models and files."""

import glob
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli import doctor, options, reports, stages

if TYPE_CHECKING:
    from clusterq_deploy.config.run_config import RunConfig


def _default_out(config: "RunConfig") -> Path:
    """Return the newest folder of a run like this one that did not come to its end; else a new one."""
    slug = config.model.rpartition(":")[2].rpartition("/")[2]
    for earlier in sorted(Path("runs").glob(f"{glob.escape(slug)}-*"), reverse=True):
        file = earlier / "run.toml"
        if file.is_file() and not (earlier / "report.html").exists() and file.read_text() == config.to_toml():
            click.echo(f"Goes on in {earlier}, where the same run did not come to its end.", err=True)
            return earlier
    return Path("runs") / f"{slug}-{time.strftime('%Y%m%d-%H%M%S')}"


@options.command(
    options.model_argument,
    options.model_options,
    options.quantize_options,
    options.fp16_option,
    options.data_options,
    options.synthesis_options,
    options.build_options,
    options.benchmark_options,
    options.run_options,
    options.out_option,
    options.config_option,
    click.option(
        "--dry-run", is_flag=True, help="Show what would be done and roughly how long it takes; write nothing."
    ),
)
def run(
    ctx: click.Context, /, out: Path | None, config_file: Path | None, dry_run: bool, as_json: bool, **_: Any
) -> None:
    """Do everything: synthesize, quantize, export, build, evaluate, features, benchmark, report.

    MODEL is `digits`, a torchvision classifier, `timm:NAME` or `path/to/module.py:factory`. Given again, a run
    goes on where it stopped; with the same --out a changed option redoes what depends on it.
    """
    from cli import render
    from clusterq_deploy.plan import plan
    from clusterq_deploy.report.text import summary

    config = options.config_of(ctx, config_file)
    out = out or _default_out(config)
    if dry_run:
        planned = plan(config, out, progress=render.LiveProgress(ctx.obj["quiet"]))
        if as_json:
            render.print_json(json.dumps({"run": str(out), **asdict(planned)}, indent=2))
        else:
            render.print_table(render.plan_table(planned))
            for line in render.plan_lines(planned):
                render.print_line(line)
        return
    pipeline = stages.pipeline_of(ctx, config, out)
    report = pipeline.run()
    if as_json:
        render.print_json(report.to_json())
        return
    render.print_table(render.report_table(report))
    for line in (summary(report), *render.conclusions(report)):
        render.print_line(line)
    for skipped in report.skipped:
        render.print_line(f"Skipped {skipped.stage}: {skipped.reason}")
    render.print_line(f"Report: {pipeline.directory.path / 'report.html'}")


@options.command(
    options.model_argument,
    options.model_options,
    options.synthesis_options,
    options.run_options,
    options.out_option,
    options.config_option,
)
def synthesize(ctx: click.Context, /, out: Path | None, config_file: Path | None, as_json: bool, **_: Any) -> None:
    """Make calibration images for MODEL, without data: the first stage of a run."""
    from cli import render
    from clusterq_deploy.run.run import IMAGES, PREVIEW

    config = options.config_of(ctx, config_file)
    pipeline = stages.pipeline_of(ctx, config, out or _default_out(config))
    pipeline.write_config()
    record = pipeline.synthesize()
    path = pipeline.directory.path
    figures = record.result.model_dump(mode="json", exclude={"losses"}) | {"seconds": record.seconds}
    if as_json:
        render.print_json(json.dumps({**figures, "run": str(path), "files": list(record.files)}))
        return
    render.print_table(render.rows_table([figures]))
    render.print_line(f"Images: {path / IMAGES}\nPreview: {path / PREVIEW}")


@options.command(click.argument("file", type=click.Path(path_type=Path), metavar="FILE.onnx"))
def check(ctx: click.Context, /, file: Path, as_json: bool) -> None:
    """Check FILE.onnx, of any exporter, against TensorRT's rules for quantized graphs, and for sums that saturate.

    No TensorRT is needed. Ends with 1 if TensorRT would refuse the graph. Warnings are about speed, and about layers
    whose integer sums leave 16 bits in ONNX Runtime on x86 CPUs without VNNI: they compute something else there.
    """
    from cli import render
    from clusterq_deploy.files import read_graph
    from clusterq_deploy.lowering import check_saturation, check_tensorrt

    graph = read_graph(file)
    broken_rules, saturating = check_tensorrt(graph), check_saturation(graph)
    if broken_rules or saturating or as_json:
        render.show([asdict(row) for row in (*broken_rules, *saturating)], as_json)
    errors = sum(rule.severity == "error" for rule in broken_rules)
    if not as_json:
        layers = f"; {len(saturating)} layers saturate in ONNX Runtime on CPUs without VNNI" if saturating else ""
        warnings = len(broken_rules) - errors
        render.print_line(f"{file}: errors {errors}, warnings {warnings} for TensorRT{layers}")
    if errors:
        ctx.exit(1)


@options.command()
def models(_: click.Context, /, as_json: bool) -> None:
    """List the models that have a name."""
    from cli import render
    from clusterq_deploy.models import available_models

    entries = available_models()
    if as_json:
        render.print_json(json.dumps([asdict(entry) for entry in entries], indent=2))
    else:
        render.print_table(render.models_table(entries))


ALL: list[click.Command] = [run, synthesize, *stages.ALL, reports.report, check, models, doctor.doctor]
