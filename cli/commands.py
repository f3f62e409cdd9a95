"""The commands that need no run: what starts one, and what looks at models and files."""

import glob
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli import options, reports, stages
from cli.diagnosis import REQUIRABLE

if TYPE_CHECKING:
    from clusterq_deploy.config.run_config import RunConfig


def _default_out(config: "RunConfig") -> Path:
    """The newest folder of a run like this one that did not come to its end; else a new one."""
    slug = config.model.rpartition(":")[2].rpartition("/")[2]
    for earlier in sorted(Path("runs").glob(f"{glob.escape(slug)}-*"), reverse=True):
        kept = earlier / "run.toml"
        if kept.is_file() and not (earlier / "report.html").exists() and kept.read_text() == config.to_toml():
            click.echo(f"Goes on in {earlier}, where the same run did not come to its end.", err=True)
            return earlier
    return Path("runs") / f"{slug}-{time.strftime('%Y%m%d-%H%M%S')}"


@click.command()
@click.argument("model", required=False)
@options.model_options
@options.quantize_options
@options.fp16_option
@options.data_options
@options.synthesis_options
@options.build_options
@options.benchmark_options
@options.run_options
@options.out_option
@options.config_option
@click.option("--dry-run", is_flag=True, help="Show what would be done, and roughly how long it takes; write nothing.")
@options.json_option
@click.pass_context
def run(
    ctx: click.Context, /, out: Path | None, config_file: Path | None, dry_run: bool, as_json: bool, **_: Any
) -> None:
    """Do everything: synthesize, quantize, export, build, evaluate, features, benchmark, report.

    MODEL is `digits`, a torchvision classifier, `timm:NAME` or `path/to/module.py:factory`. Given again, a run
    goes on where it stopped; with the same --out a changed option redoes what depends on it.
    """
    from cli import render
    from clusterq_deploy.report.text import summary

    config = options.config_of(ctx, config_file)
    out = out or _default_out(config)
    if dry_run:
        _show_plan(ctx, config, out, as_json)
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


def _show_plan(ctx: click.Context, config: "RunConfig", out: Path, as_json: bool) -> None:
    """What a run would do, on stdout."""
    from dataclasses import asdict

    from cli import render
    from clusterq_deploy.plan import plan as plan_of

    plan = plan_of(config, out, progress=render.LiveProgress(ctx.obj["quiet"]))
    if as_json:
        render.print_json(json.dumps({"run": str(out), **asdict(plan)}, indent=2))
        return
    render.print_table(render.plan_table(plan))
    for line in render.plan_lines(plan):
        render.print_line(line)


@click.command()
@click.argument("model", required=False)
@options.model_options
@options.synthesis_options
@options.run_options
@options.out_option
@options.config_option
@options.json_option
@click.pass_context
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


@click.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE.onnx")
@options.json_option
@click.pass_context
def check(ctx: click.Context, /, file: Path, as_json: bool) -> None:
    """Check FILE.onnx, of any exporter, against TensorRT's rules for quantized graphs, and for sums that saturate.

    No TensorRT is needed. Ends with 1 if TensorRT would refuse the graph. Warnings are of speed, and of layers whose
    integer sums leave 16 bits in ONNX Runtime on x86 CPUs without VNNI: they compute something else there.
    """
    from dataclasses import asdict

    from cli import render
    from clusterq_deploy.files import read_graph
    from clusterq_deploy.lowering import check_saturation, check_tensorrt

    graph = read_graph(file)
    found, saturating = check_tensorrt(graph), check_saturation(graph)
    if found or saturating or as_json:
        render.show([asdict(own) for own in (*found, *saturating)], as_json)
    errors = sum(own.severity == "error" for own in found)
    if not as_json:
        layers = f"; {len(saturating)} layers saturate in ONNX Runtime on CPUs without VNNI" if saturating else ""
        render.print_line(f"{file}: errors {errors}, warnings {len(found) - errors} for TensorRT{layers}")
    if errors:
        ctx.exit(1)


@click.command()
@options.json_option
def models(as_json: bool) -> None:
    """List the models that have a name."""
    from dataclasses import asdict

    from cli import render
    from clusterq_deploy.models import available_models

    entries = available_models()
    if as_json:
        render.print_json(json.dumps([asdict(entry) for entry in entries], indent=2))
    else:
        render.print_table(render.models_table(entries))


@click.command()
@click.option(
    "--require",
    multiple=True,
    type=click.Choice(list(REQUIRABLE)),
    help="End with 1 where this does not work either; may be repeated.  [default: none]",
)
@options.json_option
@click.pass_context
def doctor(ctx: click.Context, /, require: tuple[str, ...], as_json: bool) -> None:
    """Try out what a run needs on this machine, and say what mends what is missing.

    Slow parts are tried at the same time, each in a process of its own, which is ended after 60 seconds.

    Ends with 0 where runs work, on the CPU at least, and with 1 where something is broken that they cannot do without,
    or that --require names: it can be a container's health check.
    """
    from dataclasses import asdict

    from cli import render
    from cli.diagnosis import diagnose, healthy, unmet

    findings = diagnose(Path.cwd(), render.LiveProgress(ctx.obj["quiet"]))
    lacking = unmet(findings, require)
    works = healthy(findings) and not lacking
    if as_json:
        required = {"required": list(require), "unmet": lacking}
        found = {"healthy": works, **required, "findings": [asdict(finding) for finding in findings]}
        render.print_json(json.dumps(found, indent=2))
    else:
        render.print_table(render.findings_table(findings))
        for finding in findings:
            if finding.remedy and finding.state != "ok":
                render.print_line(f"{finding.name}: {finding.remedy}")
        render.print_line("Runs work here." if healthy(findings) else "Runs do not work here: mend what is broken.")
        if lacking:
            render.print_line(f"Required, and does not work: {', '.join(lacking)}.")
    if not works:
        ctx.exit(1)


ALL: list[click.Command] = [run, synthesize, *stages.ALL, reports.report, check, models, doctor]
