"""Export torch models to ONNX: the float graph, and the student's graph with markers for its quantizers."""

import ast
import copy
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import torch
from torch import nn

from clusterq_deploy.errors import ExportError
from clusterq_deploy.models.inputs import InputSpec

OPSET = 21
IR_VERSION = 10  # with opset 21: what onnxruntime-gpu 1.20 and TensorRT 10.3 read, INT4 included
INPUT, OUTPUT = "images", "logits"


def export_graph(model: nn.Module, size: tuple[int, int, int]) -> onnx.ModelProto:
    """Return the ONNX graph of a model, `images` (batch, C, H, W) float32 to `logits` (batch, classes) float32.

    Each quantizer becomes one `clusterq::FakeQuantize` node, named by its site; `lower` turns them into operators.
    A node's doc string says which module it is from, such as `layer1.0.relu (ReLU)`; traces of the source (paths,
    line numbers) are removed.

    A copy in eval mode on the CPU is traced, with images of `size` (channels, height, width).

    Raises:
        ExportError: torch cannot trace or translate the model.
    """
    model = copy.deepcopy(model).cpu().eval()
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the exporter's own internals
            program = torch.onnx.export(
                model,
                (torch.zeros(2, *size),),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                verbose=False,
            )
    except Exception as error:  # torch raises many kinds here, which all mean this
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise ExportError(f"torch cannot export {type(model).__name__} to ONNX: {reason}") from error
    finally:
        logger.setLevel(level)
    if program is None:  # not with dynamo=True, but torch's types say so
        raise ExportError(f"torch returned no ONNX program for {type(model).__name__}")
    proto = program.model_proto
    proto.ir_version = IR_VERSION
    _strip(proto)
    return proto


def _strip(proto: onnx.ModelProto) -> None:
    """Remove what the exporter noted about this machine's source files."""
    del proto.metadata_props[:]
    for node in proto.graph.node:
        node.doc_string = _module_of(node)
        del node.metadata_props[:]
    for message in [proto.graph, *proto.graph.value_info, *proto.graph.initializer]:
        message.ClearField("doc_string")
        del message.metadata_props[:]
    for value in [*proto.graph.input, *proto.graph.output]:
        del value.metadata_props[:]


def _module_of(node: onnx.NodeProto) -> str:
    """Return the name and class of a node's module; empty for the model itself, and if torch does not say."""
    notes = {entry.key: entry.value for entry in node.metadata_props}
    try:  # each is a list of the modules from the model down, and of the call
        *_, name, _ = ast.literal_eval(notes["pkg.torch.onnx.name_scopes"])
        *_, kind, _ = ast.literal_eval(notes["pkg.torch.onnx.class_hierarchy"])
    except (KeyError, TypeError, ValueError, SyntaxError):
        return ""
    name = name.removeprefix("net.")  # of a student
    return f"{name} ({kind.rpartition('.')[2]})" if name else ""


def annotate(
    proto: onnx.ModelProto,
    *,
    model: str,
    source: str,
    variant: str,
    inputs: InputSpec,
    provenance: Mapping[str, Any],
    class_names: Sequence[str] = (),
) -> onnx.ModelProto:
    """Write into a graph how to make its input, its classes and where it came from; return the same graph."""
    described = {"model": model, "source": source, "variant": variant, "input": inputs.model_dump_json()}
    described["provenance"] = json.dumps(dict(provenance), sort_keys=True)
    if class_names:
        described["label_names"] = json.dumps(class_names)
    onnx.helper.set_model_props(proto, {f"clusterq.{key}": value for key, value in described.items()})
    proto.producer_name = "clusterq-deploy"
    proto.graph.name = f"{model}-{variant}"
    return proto
