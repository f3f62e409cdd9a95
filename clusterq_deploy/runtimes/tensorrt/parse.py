"""Parse an ONNX graph into a TensorRT network, or say which node it fails at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from clusterq_deploy.errors import EngineError, ExportError
from clusterq_deploy.files import read_graph
from clusterq_deploy.runtimes.tensorrt.failures import diagnose

if TYPE_CHECKING:
    import tensorrt as trt

_DOC_LENGTH = 160


def parse(parser: trt.OnnxParser, onnx_path: Path, source: Path) -> None:
    """Parse the graph into the parser's network.

    Args:
        parser: of the network.
        onnx_path: the graph.
        source: the file that the user knows, where the graph was made of it.

    Raises:
        EngineError: TensorRT cannot; the message has every problem with its node, its operator and the node's doc
            string, and what to do.
    """
    parsed: bool = parser.parse_from_file(str(onnx_path))
    if parsed:
        return
    docs = _doc_strings(onnx_path)
    problems, said = [], []
    for index in range(parser.num_errors):
        error: trt.ParserError = parser.get_error(index)
        name: str = error.node_name()
        operator: str = error.node_operator()
        description: str = error.desc()
        said.append(" ".join(description.split()))
        parts = [operator or "no operator", *([f'"{docs[name]}"'] if name in docs else [])]
        problems.append(f"{name or 'unnamed node'} ({', '.join(parts)}): {said[-1]}")
    found = diagnose(said)
    advice = found.advice if found else f"clusterq check {source} says which of TensorRT's rules the graph breaks"
    raise EngineError(f"TensorRT cannot parse {source}: {'; '.join(problems) or 'no reason given'}; {advice}")


def _doc_strings(onnx_path: Path) -> dict[str, str]:
    """What the exporter noted of each node, such as its place in the source, by the node's name."""
    try:
        nodes = read_graph(onnx_path).graph.node
    except ExportError:  # TensorRT's own words say what is wrong with the file
        return {}
    docs = {node.name: " ".join(node.doc_string.split()) for node in nodes if node.name}
    return {name: doc if len(doc) <= _DOC_LENGTH else f"{doc[:_DOC_LENGTH]}..." for name, doc in docs.items() if doc}
