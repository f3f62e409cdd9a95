"""The `trtexec` command that repeats a measurement with NVIDIA's own tool."""

import shlex
from collections.abc import Sequence


def trtexec_command(
    engine: str,
    *,
    input_name: str,
    shape: Sequence[int],
    dynamic: bool,
    warmup_ms: float,
    min_runs: int,
    min_seconds: float,
    cuda_graph: bool,
    version_compatible: bool,
    tensorrt: str,
) -> str:
    """One line for a shell. trtexec 11 copies nothing and replays a CUDA graph unless it is told otherwise; 10 the
    other way round, and does not know the flags of 11.

    Args:
        engine: the engine's path, as the line is to have it.
        input_name, shape: of the input, (N, C, H, W).
        dynamic: whether the engine leaves the batch open; trtexec takes shapes for such engines alone.
        warmup_ms, min_runs, min_seconds: how it is measured.
        cuda_graph: whether a CUDA graph is replayed.
        version_compatible: whether the engine carries a runtime of its own, which trtexec loads when it is told to.
        tensorrt: the release whose trtexec it is: that which measured.
    """
    flags = [f"--loadEngine={engine}"]
    if dynamic:
        flags.append(f"--shapes={input_name}:{'x'.join(map(str, shape))}")
    flags += [f"--warmUp={warmup_ms:g}", f"--duration={min_seconds:g}", f"--iterations={min_runs}"]
    flags.append("--percentile=50,90,95,99")
    if int(tensorrt.partition(".")[0]) >= 11:
        flags += ["--includeDataTransfers", *([] if cuda_graph else ["--noCudaGraph"])]
    else:  # torch's events are waited for without sleep
        flags += ["--useSpinWait", *(["--useCudaGraph"] if cuda_graph else [])]
    if version_compatible:
        flags.append("--versionCompatible")
    return shlex.join(["trtexec", *flags])
