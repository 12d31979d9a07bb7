"""ONNX Runtime sessions as we open them everywhere, and the accuracy of a file.

Threads do not spin while they wait: a device has other work, and a laptop a battery.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgefl.errors import ConfigError, MissingExtra
from edgefl.trees import Array

INPUT, OUTPUT = "input", "output"  # names that our exports give
_BATCH = 256


def open_session(path: Path, threads: int = 1) -> Any:
    """Open a model on the CPU; raises ConfigError for a file that is none, MissingExtra without onnxruntime."""
    try:
        import onnxruntime
    except ImportError as cause:
        raise MissingExtra("running an ONNX model", "agent") from cause
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; its warnings are about its own optimiser
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except ort_errors() as cause:
        raise ConfigError(f"{path} is not a model that ONNX Runtime can open: {cause}") from cause


def ort_errors() -> tuple[type[Exception], ...]:
    """Return what ONNX Runtime raises; its errors have no base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented")
    return (state.RuntimeException, *(getattr(state, name) for name in names))


def input_name(session: Any) -> str:
    """Return the name of a session's one input."""
    names = [node.name for node in session.get_inputs()]
    if len(names) != 1:
        raise ConfigError(f"the model has {len(names)} inputs ({', '.join(names)}); wanted is one")
    return str(names[0])


def is_classified(outputs: Array, targets: Array) -> bool:
    """Say whether targets are classes for outputs of shape (N, C, ...): integers in 0..C-1, one a place."""
    return _has_scores(outputs, targets) and bool(((targets >= 0) & (targets < outputs.shape[1])).all())


def accuracy_of(path: Path, inputs: Array, targets: Array) -> float:
    """Return the share of targets that are the index of the largest output: of a picture, over its pixels.

    Raises ConfigError where the targets are not classes.
    """
    if len(inputs) == 0 or len(inputs) != len(targets):
        raise ConfigError(f"accuracy needs as many targets as inputs, and one at least: {len(inputs)}, {len(targets)}")
    session = open_session(path)
    name, right = input_name(session), 0
    for start in range(0, len(inputs), _BATCH):
        (outputs,) = session.run(None, {name: np.asarray(inputs[start : start + _BATCH])})
        chunk = np.asarray(targets[start : start + _BATCH])
        if not _has_scores(outputs, chunk):
            raise ConfigError(
                f"{path.name} gives {outputs.dtype}{list(outputs.shape)} for targets of {chunk.dtype}"
                f"{list(chunk.shape)}: these are not classes, so there is no accuracy"
            )
        right += int((outputs.argmax(axis=1) == chunk).sum())
    return right / np.asarray(targets).size


def _has_scores(outputs: Array, targets: Array) -> bool:
    """Say whether outputs have scores, two at least, where targets have an integer."""
    if targets.dtype.kind not in "iu" or outputs.ndim < 2 or outputs.shape[1] < 2:
        return False
    return targets.shape == (len(outputs), *outputs.shape[2:])
