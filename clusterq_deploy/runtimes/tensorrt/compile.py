"""Ask TensorRT-RTX's parser and compiler about a graph, in a process of their own: a file may crash them."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from calib.support.progress import SILENT
from clusterq_deploy.errors import ClusterQError, GraphRefused
from clusterq_deploy.results.engines import Compilation, Refusal
from clusterq_deploy.runtimes.tensorrt.build import build_engine
from clusterq_deploy.runtimes.tensorrt.gpu import build_problem, require
from clusterq_deploy.runtimes.tensorrt.library import RTX_DEFAULT
from clusterq_deploy.runtimes.tensorrt.sidecar import BuildConfig


def compile_graph(onnx_path: Path) -> Compilation:
    """Return what the parser or the compiler refuses in a graph, of any exporter, or the plan of its engine.

    The engine is for the default GPUs, and is not kept.

    Raises:
        TensorRTMissing: TensorRT-RTX is not installed.
    """
    require(build_problem("tensorrt_rtx"))
    command = [sys.executable, "-m", __spec__.name, str(onnx_path)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode == 0:
        return Compilation.model_validate_json(done.stdout)
    return Compilation(refusals=[_crash(done.returncode, done.stderr.decode(errors="replace"))])


def _crash(code: int, log: str) -> Refusal:
    """Return why the process ended without an answer: the signal that ended it, or its last line."""
    if code < 0:
        killed = -code == getattr(signal, "SIGKILL", None)
        remedy = (
            "end other programs: the memory ran out" if killed else "leave out nodes until it does not: it is a bug"
        )
        return Refusal(reason=f"the compiler crashes with signal {-code} on this file", remedy=remedy)
    lines = [line for line in log.splitlines() if line.strip()]
    return Refusal(reason=f"the compiler ends with code {code}: {' '.join(lines[-1:]) or 'no reason given'}")


def _compile(onnx_path: Path) -> Compilation:
    """Build an engine of a graph in this process."""
    with TemporaryDirectory() as folder:
        try:
            config = BuildConfig(rtx=RTX_DEFAULT)
            info = build_engine(onnx_path, Path(folder) / "model.rtx.engine", config, SILENT)
        except GraphRefused as error:
            return Compilation(refusals=error.refusals)
        except ClusterQError as error:
            return Compilation(refusals=[Refusal(reason=str(error))])
    return Compilation(plan=info.plan)


if __name__ == "__main__":
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print to stdout too
    output.write(_compile(Path(sys.argv[1])).model_dump_json())
    output.close()
