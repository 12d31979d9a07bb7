"""ONNX Runtime sessions: the only module that opens them and knows their exceptions.

Threads do not spin while they wait: that would cost a device CPU time and battery.
"""

from __future__ import annotations

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
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors only; warnings are about its optimiser
    if not keeps_memory:  # no arena as large as the largest request, no patterns for every shape seen
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


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
