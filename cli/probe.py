"""Runs a tiny graph on one provider of ONNX Runtime, or starts TensorRT's builder: `python -m cli.probe tensorrt`.

It is a process of its own, for a library that does not fit the others may crash the one that it is loaded into. The
log on stderr says why one does not load; the exit code is 0 where it works.
"""

import sys
from contextlib import suppress

import torch  # noqa: F401  (brings the CUDA libraries that the others find in a run, too)

_IR_VERSION, _OPSET = 10, 21


def graph() -> bytes:
    """An ONNX graph of one convolution that adds up nine values: x (1, 1, 3, 3) float32 to y (1, 1, 1, 1)."""
    import onnx
    from onnx import TensorProto, helper

    weight = helper.make_tensor("weight", TensorProto.FLOAT, [1, 1, 3, 3], [1.0] * 9)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, side, side])
        for name, side in (("x", 3), ("y", 1))
    ]
    convolution = helper.make_node("Conv", ["x", "weight"], ["y"])
    body = helper.make_graph([convolution], "probe", ends[:1], ends[1:], [weight])
    opsets = [helper.make_opsetid("", _OPSET)]
    model: onnx.ModelProto = helper.make_model(body, ir_version=_IR_VERSION, opset_imports=opsets)
    data: bytes = model.SerializeToString()
    return data


def start_tensorrt() -> None:
    """Start TensorRT's builder; ends the process with a message where that does not work."""
    from clusterq_deploy.engine.availability import start_builder
    from clusterq_deploy.errors import EngineError

    try:
        start_builder()
    except EngineError as error:
        sys.exit(str(error))


def run_graph(provider: str) -> None:
    """Run the graph on `provider`; ends the process with a message where that does not work."""
    import numpy as np
    import onnxruntime

    if provider.startswith("Tensorrt"):
        with suppress(ImportError, OSError):  # as in a run: it loads the libraries that its wheel has
            import tensorrt  # noqa: F401
    session = onnxruntime.InferenceSession(graph(), providers=[provider], enable_fallback=0)
    if provider not in session.get_providers():
        sys.exit(f"ONNX Runtime fell back to {session.get_providers()[0]}")
    (found,) = session.run(None, {"x": np.ones((1, 1, 3, 3), np.float32)})
    if found.item() != 9:
        sys.exit(f"computes {found.item()} where 9 is right")


if __name__ == "__main__":
    if sys.argv[1] == "tensorrt":
        start_tensorrt()
    else:
        run_graph(sys.argv[1])
