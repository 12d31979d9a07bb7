"""ONNX Runtime sessions: the only module that opens them and knows their exceptions.

Threads do not spin while they wait: that would cost a device CPU time and battery.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgefl.errors import ConfigError, MissingExtra


def open_session(path: Path) -> Any:
    """Open a model to evaluate it; raises ConfigError if the file is not a model, MissingExtra without onnxruntime."""
    try:
        return new_session(path, threads=1)
    except ort_errors() as cause:
        raise ConfigError(f"{path} is not a model that ONNX Runtime can open: {cause}") from cause


def new_session(path: Path, *, threads: int = 0, keeps_memory: bool = True) -> Any:
    """Open a model on the CPU; raises the errors in `ort_errors`, and MissingExtra without onnxruntime.

    `threads` 0 lets ONNX Runtime choose. A session that keeps memory is faster in the next run with the same shape,
    but never releases the memory of its largest run.
    """
    try:
        import onnxruntime
    except ImportError as cause:
        raise MissingExtra("running an ONNX model", "agent") from cause
    options = _options(threads)
    if not keeps_memory:  # no arena as large as the largest request, no patterns for every shape seen
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _options(threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors only; warnings are about its optimiser
    return options


def profiled(
    path: Path, feeds: Mapping[str, Any], folder: Path, *, repeats: int, threads: int = 0, optimised: bool = True
) -> tuple[dict[str, float], list[Any]]:
    """Run a model under ONNX Runtime's profiler.

    Returns the median milliseconds of each node by name, and the nodes (NodeProto) that ran: the file's own, or what
    the optimiser made of them, without other layouts of tensors, whose nodes do not tell what they stand for. `folder`
    is for files.
    """
    import onnx
    import onnxruntime

    options, ran = _options(threads), path
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED if optimised else levels.ORT_DISABLE_ALL
    if optimised:
        ran = folder / "optimised.onnx"
        options.optimized_model_filepath = str(ran)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "optimised.data"
        )  # fmt: skip
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for _ in range(repeats + 1):
        session.run(None, dict(feeds))
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    times_ms: dict[str, list[float]] = {}
    for event in events:
        name, is_kernel, _ = event["name"].partition("_kernel_time")
        if is_kernel:
            times_ms.setdefault(name, []).append(event["dur"] / 1e3)
    nodes = list(onnx.load(ran, load_external_data=False).graph.node)
    return {name: statistics.median(found[1:] or found) for name, found in times_ms.items()}, nodes


def ort_errors() -> tuple[type[Exception], ...]:
    """Return ONNX Runtime's exceptions: a dozen classes without a common base; none if it is not installed."""
    try:
        from onnxruntime.capi import onnxruntime_pybind11_state as state
    except ImportError:
        return ()
    return tuple(one for one in vars(state).values() if isinstance(one, type) and issubclass(one, Exception))


def run_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of loading or running a model: ONNX Runtime's own, and those that it passes on."""
    return (*ort_errors(), RuntimeError, ValueError, MemoryError)


def input_name(session: Any) -> str:
    """Return the name of a session's only input."""
    names = [node.name for node in session.get_inputs()]
    if len(names) != 1:
        raise ConfigError(f"the model has {len(names)} inputs ({', '.join(names)}); expected one")
    return str(names[0])
