"""The commands that need no run directory (what starts a run, looks at models and files), and the report of runs."""

import glob
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli import doctor, options, stages

if TYPE_CHECKING:
    from clusterq_deploy.config.run_config import RunConfig


def _default_out(config: "RunConfig") -> Path:
    """Return the newest folder of an unfinished run of the same configuration; else a new one."""
    slug = config.model.rpartition(":")[2].rpartition("/")[2]
    for folder in sorted(Path("runs").glob(f"{glob.escape(slug)}-*"), reverse=True):
        file = folder / "run.toml"
        if file.is_file() and not (folder / "report.html").exists() and file.read_text() == config.to_toml():
            click.echo(f"Resuming the unfinished run in {folder}.", err=True)
            return folder
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
    click.option("--dry-run", is_flag=True, help="Show the stages and roughly how long they take; write nothing."),
)
def run(
    ctx: click.Context, /, out: Path | None, config_file: Path | None, dry_run: bool, as_json: bool, **_: Any
) -> None:
    """Do everything: synthesize, quantize, export, build, evaluate, features, benchmark, report.

    MODEL is `digits`, a torchvision classifier, `timm:NAME`, `path/to/module.py:factory` or `path/to/program.pt2`.
    The same command resumes an interrupted run; with the same --out a changed option redoes the stages that depend on
    it.
    """
    from cli import render
    from clusterq_deploy.plan import plan

    config = options.config_of(ctx, config_file)
    out = out or _default_out(config)
    if dry_run:
        planned = plan(config, out, progress=render.LiveProgress(ctx.obj["quiet"]))
        if as_json:
            render.print_json({"run": str(out), **asdict(planned)})
        else:
            render.print_plan(planned)
        return
    report = stages.pipeline_of(ctx, config, out).run()
    if as_json:
        render.print_text(report.to_json())
    else:
        render.print_report(report, out)


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
        render.print_json({**figures, "run": str(path), "files": list(record.files)})
    else:
        render.show([figures], as_json)
        render.print_line(f"Images: {path / IMAGES}\nPreview: {path / PREVIEW}")


@options.command(
    click.argument("runs", nargs=-1, required=True, type=options.PATH, metavar="RUN..."),
    click.option("--compare", is_flag=True, help="Show the reports of several runs side by side; write nothing."),
    click.option("--markdown", is_flag=True, help="Print Markdown tables."),
    click.option("--csv", is_flag=True, help="Print CSV: a row per variant and file, with all numbers."),
)
def report(
    ctx: click.Context, /, runs: tuple[Path, ...], compare: bool, as_json: bool, markdown: bool, csv: bool
) -> None:
    """Write report.json, report.md and report.html of RUN from the stages that are finished.

    With --compare, show the existing reports of several runs side by side instead.
    """
    from cli import render
    from clusterq_deploy.report.compare import compare as compare_reports
    from clusterq_deploy.report.compare import read_reports

    forms = [name for name, given in (("json", as_json), ("markdown", markdown), ("csv", csv)) if given]
    if len(forms) > 1:
        raise click.UsageError(f"{' and '.join(f'--{name}' for name in forms)} exclude each other: give one", ctx)
    if compare:
        comparison = compare_reports(read_reports(list(runs)))
    elif len(runs) > 1:
        raise click.UsageError(f"got {len(runs)} runs, expected one: add --compare to show them side by side", ctx)
    else:
        written = stages.resume(ctx, runs[0]).report()
        if as_json:
            render.print_text(written.to_json())
            return
        if not forms:
            render.print_report(written, runs[0])
            return
        comparison = compare_reports({runs[0].resolve().name: written})
    if forms:
        convert = {"json": comparison.to_json, "csv": comparison.to_csv, "markdown": comparison.to_markdown}
        render.print_text(convert[forms[0]]())
    else:
        for table in comparison.tables():
            render.print_table(render.rich_table(table))
        for note in comparison.notes:
            render.print_line(note)


@options.command(
    click.argument("file", type=options.PATH, metavar="FILE.onnx"),
    click.option(
        "--compile",
        "compiled",
        is_flag=True,
        help="Also ask the parser and the compiler of TensorRT-RTX, for the default GPUs of build --rtx.",
    ),
)
def check(ctx: click.Context, /, file: Path, compiled: bool, as_json: bool) -> None:
    """Check FILE.onnx, of any exporter, against TensorRT's rules for quantized graphs, and for sums that saturate.

    TensorRT is not needed. The exit code is 1 if TensorRT would refuse the graph. Warnings are about speed, and about
    layers whose integer sums exceed 16 bits in ONNX Runtime on x86 CPUs without VNNI, where they saturate.

    With --compile, what the real parser or compiler refuses is listed too, as `compile`, and the exit code is 1 if it
    refuses anything; else a line has the plan of the engine. They run in a process of their own and need no GPU.
    """
    from cli import render
    from clusterq_deploy.files import read_graph
    from clusterq_deploy.lowering import check_saturation, check_tensorrt
    from clusterq_deploy.runtimes.tensorrt.compile import compile_graph

    graph = read_graph(file)
    broken_rules, saturating = check_tensorrt(graph), check_saturation(graph)
    compilation = compile_graph(file) if compiled else None
    refusals = compilation.refusals if compilation else []
    rules: dict[str, list[str]] = {}
    for rule in broken_rules:
        rules.setdefault(rule.node, []).append(f"{rule.message} (rule {rule.rule})")
    rows = [asdict(row) for row in (*broken_rules, *saturating)] + [
        {
            "rule": "compile",
            "severity": "error",
            "node": refusal.node,
            "message": f"{refusal.operator or 'compiler'}: {refusal.reason}; "
            + (
                refusal.remedy or "; ".join(rules.get(refusal.node, ["no rule names it: change the node in the model"]))
            ),
        }
        for refusal in refusals
    ]
    if rows or as_json:
        render.show(rows, as_json)
    errors = sum(rule.severity == "error" for rule in broken_rules)
    if not as_json:
        layers = f"; {len(saturating)} layers saturate in ONNX Runtime on CPUs without VNNI" if saturating else ""
        warnings = len(broken_rules) - errors
        render.print_line(f"{file}: errors {errors}, warnings {warnings} for TensorRT{layers}")
        if compilation:
            render.print_line(f"{file}: {render.compiled(compilation)}")
    if errors or refusals:
        ctx.exit(1)


@options.command()
def models(_: click.Context, /, as_json: bool) -> None:
    """List the models that have a name."""
    from cli import render
    from clusterq_deploy.models import available_models

    entries = available_models()
    if as_json:
        render.print_json([asdict(entry) for entry in entries])
    else:
        render.print_table(render.models_table(entries))


ALL: list[click.Command] = [run, synthesize, *stages.ALL, report, check, models, doctor.doctor]
