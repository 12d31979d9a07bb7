"""Making a model's structure without its weights: on a device that could not hold them.

Parameters are on torch's meta device, which has no memory; buffers are real, because those that are not in the state
dict (the frequencies of rotary positions) are computed when the model is made. As accelerate's `init_empty_weights`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_HERE = threading.local()


def structure_only() -> bool:
    """Whether a task's `model` is called for the structure alone: it need not load weights, which come with the job."""
    return bool(getattr(_HERE, "is_bare", False))


@contextmanager
def without_weights() -> Iterator[None]:
    """Make modules inside whose parameters have no memory."""
    import torch

    register = torch.nn.Module.register_parameter

    def on_meta(self: torch.nn.Module, name: str, param: Any) -> None:
        register(self, name, param)
        if param is not None and param.device.type != "meta":
            bare = torch.nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
            self._parameters[name] = bare

    _HERE.is_bare = True
    torch.nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
        _HERE.is_bare = False
