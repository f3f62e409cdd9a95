"""What TensorRT-RTX's compiler makes of a graph in several spellings, and of graphs that other quantizers write.

    PYTHONPATH=. python benchmarks/plans.py                # all, resumable; results in benchmarks/results/plans.json
    PYTHONPATH=. python benchmarks/plans.py --model resnet18
    PYTHONPATH=. python benchmarks/plans.py --table        # docs/rtx.md

It needs the extra `rtx`, and nvidia-modelopt for the rows of ModelOpt, which are left out without it. Weights are
random: plans do not depend on them. No GPU is needed, and nothing is timed.
"""

import importlib.util
import json
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import torch
from harness import code_digest
from latency import statically_quantized
from onnx_ir.passes.common import RemoveUnusedNodesPass
from random_nets import CALIBRATED, SEED, calibrated, settled
from store import write
from tables import table

from calib.support.progress import SILENT
from clusterq_deploy.environment import collect_environment
from clusterq_deploy.errors import ClusterQError
from clusterq_deploy.lowering import export_graph, lower, to_fp16, to_tensorrt_rtx
from clusterq_deploy.lowering.fp16 import factor_steps
from clusterq_deploy.lowering.qdq import constant, dequantized, operand, store
from clusterq_deploy.quantization import BitWidths
from clusterq_deploy.report.plans import megabytes
from clusterq_deploy.results.engines import EnginePlan
from clusterq_deploy.runtimes.tensorrt import BuildConfig, build_engine, library_version

RESULTS = Path(__file__).parent / "results" / "plans.json"
PAGE = Path(__file__).parents[1] / "docs" / "rtx.md"
MODELS = ("resnet18", "mobilenet_v2", "resnet50")
_THIN = 32  # channels that a convolution reads or writes
_FP8_TARGET = "sm89"  # the first with FP8
_REFERENCE = "FP16"

Spelling = Callable[[onnx.ModelProto], onnx.ModelProto]


def convolutions(model: onnx.ModelProto, change: Callable[[ir.Graph, ir.Node], None]) -> onnx.ModelProto:
    """Return a graph whose convolutions were changed."""
    changed = ir.from_proto(model)
    for node in list(changed.graph):
        if node.op_type == "Conv":
            change(changed.graph, node)
    RemoveUnusedNodesPass()(changed)
    return ir.to_proto(changed)


def bias_behind(graph: ir.Graph, layer: ir.Node) -> None:
    """Write a convolution's bias as an addition."""
    bias, output = constant(layer, 2), layer.outputs[0]
    if bias is None:
        return
    values = store(graph, f"{output.name}.bias", bias.astype(np.float32).reshape(1, -1, 1, 1))
    readers = list(output.uses())
    layer.resize_inputs(2)
    added = ir.node("Add", [output, values], name=f"{output.name}.added")
    graph.insert_after(layer, added)
    for use in readers:
        use.node.replace_input_with(use.idx, added.outputs[0])


def in_float(model: onnx.ModelProto, chosen: Callable[[ir.Graph, ir.Node], bool]) -> onnx.ModelProto:
    """Return a graph whose chosen convolutions have float weights and read what is in front of the quantizer."""

    def change(graph: ir.Graph, layer: ir.Node) -> None:
        weight, read = dequantized(operand(layer, 1)), dequantized(operand(layer, 0))
        if weight is None or weight.scale is None or read is None or not chosen(graph, layer):
            return
        integers = weight.source.const_value
        assert integers is not None
        shape = (-1, *[1] * (len(integers.shape) - 1))
        numbers = integers.numpy().astype(np.float32) * weight.scale.astype(np.float32).reshape(shape)
        layer.replace_input_with(1, store(graph, f"{layer.outputs[0].name}.float", numbers))
        layer.replace_input_with(0, read.source)

    return convolutions(model, change)


def channels(layer: ir.Node) -> tuple[int, int, int]:
    """Return how many channels a convolution writes, how many it reads in a group, and its groups."""
    weight = dequantized(operand(layer, 1))
    assert weight is not None
    assert weight.source.const_value is not None
    written, read = weight.source.const_value.numpy().shape[:2]
    return written, read, layer.attributes.get_int("group", 1)


def residuals_in_float(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph whose additions read no quantizer."""
    changed = ir.from_proto(model)
    for node in list(changed.graph):
        if node.op_type == "Add":
            for index in (0, 1):
                read = dequantized(operand(node, index))
                if read is not None and not read.constant:
                    node.replace_input_with(index, read.source)
    RemoveUnusedNodesPass()(changed)
    return ir.to_proto(changed)


def in_fp8(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph with FP8 (E4M3) in place of INT8, rounded to it from the same integers."""
    changed = ir.from_proto(model)
    for name, value in list(changed.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.dtype is ir.DataType.INT8:
            value.const_value = ir.tensor(tensor.numpy().astype(ml_dtypes.float8_e4m3fn), name=name)
            value.dtype = ir.DataType.FLOAT8E4M3FN
    proto = ir.to_proto(changed)
    proto.graph.ClearField("value_info")
    return proto


SPELLINGS: dict[str, tuple[Spelling, str]] = {
    "as TensorRT reads it": (lambda graph: graph, "none"),
    "the same, scales in FP16": (to_fp16, "FP16's rounding"),
    "the same, biases as additions": (lambda graph: convolutions(graph, bias_behind), "none"),
    "one step per weight, factors behind, in FP32": (
        lambda graph: convolutions(graph, lambda g, node: factor_steps(g, node, np.float32)),
        "none",
    ),
    "one step per weight, factors behind, in FP16 (used)": (to_tensorrt_rtx, "FP16's rounding"),
    "that, additions read no quantizer": (lambda graph: to_tensorrt_rtx(residuals_in_float(graph)), "FP16's rounding"),
    "that, the first convolution in FP16": (
        lambda graph: to_tensorrt_rtx(
            in_float(graph, lambda g, node: node is next(n for n in g if n.op_type == "Conv"))
        ),
        "FP16's rounding",
    ),
    "that, depthwise convolutions in FP16": (
        lambda graph: to_tensorrt_rtx(in_float(graph, lambda _, node: channels(node)[2] > 1)),
        "FP16's rounding",
    ),
    f"that, convolutions of {_THIN} channels or fewer in FP16": (
        lambda graph: to_tensorrt_rtx(in_float(graph, lambda _, node: min(channels(node)[:2]) <= _THIN)),
        "FP16's rounding",
    ),
    "all convolutions in FP16, weights rounded to INT8": (
        lambda graph: to_tensorrt_rtx(in_float(residuals_in_float(graph), lambda _, __: True)),
        "that of the weights",
    ),
    "FP8 (E4M3) in place of INT8": (lambda graph: in_fp8(to_tensorrt_rtx(graph)), "not measured"),
}
"""Ways to write one quantized graph, each with what it changes of the function."""


def plan_of(model: onnx.ModelProto, batch: int, target: str = "sm86") -> EnginePlan:
    """Build an engine and return its plan."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        config = BuildConfig(rtx=(target,), batch=(batch, batch, batch))
        plan = build_engine(path, path.with_suffix(".engine"), config, SILENT).plan
    assert plan is not None
    return plan


def measure(name: str) -> dict[str, Any]:
    """Return the plans of one model: in float, in each spelling, and as others quantize it."""
    model, seen = settled(name, CALIBRATED)
    size, student = model.input.size, calibrated(model, BitWidths(8, 8), seen)
    fp32, graph = export_graph(model.module, size), lower(export_graph(student, size), student, "tensorrt")
    graphs = {"FP32": fp32, _REFERENCE: to_fp16(fp32)}
    graphs |= {spelling: spell(graph) for spelling, (spell, _) in SPELLINGS.items()}
    images = seen.numpy()
    graphs["ONNX Runtime's quantize_static"] = statically_quantized(fp32, images, for_tensorrt=True)
    if importlib.util.find_spec("modelopt"):
        # in a process of its own: it replaces functions of ONNX Runtime's quantizer
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            theirs = pool.submit(quantized_by_modelopt, fp32.SerializeToString(), images).result()
        graphs["ModelOpt's INT8"] = onnx.load_from_string(theirs)
    plans: dict[str, Any] = {}
    for spelling, proto in graphs.items():
        try:
            made = {
                str(batch): plan_of(proto, batch, _FP8_TARGET if "FP8" in spelling else "sm86") for batch in (1, 32)
            }
            plans[spelling] = {batch: plan.model_dump(exclude={"layers"}) for batch, plan in made.items()}
        except ClusterQError as error:
            plans[spelling] = {"error": str(error).replace(tempfile.gettempdir(), "")[:200]}
    return plans


def quantized_by_modelopt(model: bytes, images: np.ndarray[Any, np.dtype[np.float32]]) -> bytes:
    """Return what nvidia-modelopt makes of a float graph."""
    from modelopt.onnx.quantization import quantize  # type: ignore[import-not-found, unused-ignore]

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(model)
        quantize(str(source), quantize_mode="int8", calibration_data={"images": images}, output_path=str(target))
        return target.read_bytes()


def page(results: dict[str, Any]) -> str:
    """Return the text of docs/rtx.md."""
    parts = [_INTRODUCTION]
    head = (
        "graph",
        "kernels",
        "INT8 convolutions",
        "they write",
        "activations, MB",
        "of FP16",
        "with weights, batch 1",
        "changes",
    )
    for name, record in results["models"].items():
        base = record["plans"][_REFERENCE]["1"]
        rows: list[list[object]] = []
        for spelling, plans in record["plans"].items():
            changes = SPELLINGS[spelling][1] if spelling in SPELLINGS else ""
            if "error" in plans:
                rows.append([spelling, plans["error"], *[""] * 6])
                continue
            plan, moved = (
                plans["1"],
                [_moved(p) for p in (plans["1"], base, plans["32"], record["plans"][_REFERENCE]["32"])],
            )
            total = (moved[0] + plan["bytes_stored"]) / (moved[1] + base["bytes_stored"])
            counts = f"{plan['convolutions_int8']} of {plan['convolutions']}"
            writes = ", ".join(plan["convolutions_write"])
            ratios = f"{moved[0] / moved[1]:.2f} / {moved[2] / moved[3]:.2f}"
            rows.append(
                [spelling, plan["kernels"], counts, writes, megabytes(moved[0]), ratios, f"{total:.2f}", changes]
            )
        parts.append(f"## {name}\n\n{table(head, rows)}")
    machine, release = record["environment"], record["release"]
    parts.append(
        f"TensorRT-RTX {release}, torch {machine['torch']}, ONNX Runtime {machine['onnxruntime']}; seed {SEED}.\n"
    )
    return "\n".join(parts)


def _moved(plan: dict[str, Any]) -> int:
    return int(plan["bytes_in"] + plan["bytes_out"])


_INTRODUCTION = """# Spellings for TensorRT-RTX

What the compiler of TensorRT-RTX makes of one W8A8 network, by the way it is written, and of the INT8 graphs of other
quantizers; by `python benchmarks/plans.py`, for sm86 (FP8: sm89). Bytes are those of activations per image, as all
kernels read and write them, relative to the FP16 plan at batch 1 / 32; *with weights* adds the weights, which are read
once per call. A plan is no latency: no engine was run.

No INT8 convolution writes INT8 on this release: it writes float, and a second kernel applies the activation and rounds
again, where an FP16 convolution is fused with its bias, residual and ReLU. With a step per output channel, which all
quantizers use, it writes FP32 even if all scales are FP16. With one step for the whole weight it writes FP16; factors
per channel behind it, in the second kernel, make it the same function. That is the spelling that `--rtx` builds. Large
batches move more bytes than FP16 all the same, in more kernels; at batch 1, where weights count, the two ResNets move
fewer. No mixture of INT8 and FP16 that was tried moves fewer activations than FP16 alone, so there is no option for
one. The last column says what a spelling changes of the quantized network's function.
"""


@click.command()
@click.option("--model", "models", multiple=True, default=MODELS, help="Only these; all by default.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
@click.option("--table", "write_table", is_flag=True, help="Write docs/rtx.md and measure nothing.")
def main(models: tuple[str, ...], out: Path, write_table: bool) -> None:
    """Measure the models without results of these sources, and save their records."""
    results: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {"models": {}}
    if write_table:
        write(PAGE, page(results))
        return
    code = code_digest()
    for name in models:
        if results["models"].get(name, {}).get("code") == code:
            print(f"already measured: {name}")
            continue
        plans, environment = measure(name), collect_environment(torch.device("cpu")).model_dump(mode="json")
        release = library_version("tensorrt_rtx")
        results["models"][name] = {"plans": plans, "code": code, "release": release, "environment": environment}
        write(out, json.dumps(results, indent=1) + "\n")
        print(f"{name}: {len(plans)} plans", flush=True)


if __name__ == "__main__":
    main()
