"""Silence for torch's tracing, which logs the stack of each failure; the caller tells the failure itself."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from edgefl.terminal import debug

_SLOW_IN_STACKS = "There is a performance drop because we have not yet implemented the batching rule"
_LOGGERS = ("torch.onnx", "torch.fx", "torch.export", "torch._export", "torch._dynamo", "torch._subclasses.fake_tensor")


@contextmanager
def quiet_tracing() -> Iterator[None]:
    """Log nothing of torch's tracing, unless --debug is set. Not for several threads at once."""
    loggers = [] if debug.wanted() else [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def quiet_stacks() -> None:
    """Ignore torch.func's warning of an operation that is slow over a stack, unless --debug is set.

    Whoever asks for stacks cannot change it, and `auto` measures what it costs.
    """
    if not debug.wanted():
        warnings.filterwarnings("ignore", _SLOW_IN_STACKS)
