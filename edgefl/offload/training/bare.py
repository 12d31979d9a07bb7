"""Making a model's structure without its weights: on a device that could not hold them.

Parameters are on torch's meta device, which has no memory; buffers are real, because those that are not in the state
dict (the frequencies of rotary positions) are computed when the model is made. As accelerate's `init_empty_weights`.
A large tensor that modules make without values (torch.empty), to fill it later, never has memory: not for a moment. As
a buffer outside the state dict it would have lost its values, so it is refused.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from edgefl.errors import ConfigError

LARGE = 1 << 18  # elements

_HERE = threading.local()


def structure_only() -> bool:
    """Whether a task's `model` is called for the structure alone: it need not load weights, which come with the job."""
    return bool(getattr(_HERE, "is_bare", False))


@contextmanager
def without_weights() -> Iterator[None]:
    """Make modules inside whose parameters have no memory."""
    import torch
    from torch.overrides import TorchFunctionMode

    class LargeOnMeta(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = kwargs or {}
            if func is torch.empty and _num_elements(args, given) >= LARGE:
                given = {**given, "device": "meta"}
            return func(*args, **given)

    register, register_buffer = torch.nn.Module.register_parameter, torch.nn.Module.register_buffer

    def not_on_meta(self: torch.nn.Module, name: str, tensor: Any, persistent: bool = True) -> None:  # noqa: FBT001, FBT002 - torch's
        if tensor is not None and tensor.is_meta and not persistent:
            raise ConfigError(
                f"buffer {name!r} of {type(self).__name__} {list(tensor.shape)} is made by torch.empty and filled "
                "later, and is not in the state dict, so it has no values where a model is made without weights. Make "
                "it with its values (torch.full, torch.zeros)"
            )
        register_buffer(self, name, tensor, persistent)

    def on_meta(self: torch.nn.Module, name: str, param: Any) -> None:
        register(self, name, param)
        if param is not None and param.device.type != "meta":
            bare = torch.nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
            self._parameters[name] = bare

    _HERE.is_bare = True
    torch.nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    torch.nn.Module.register_buffer = not_on_meta  # type: ignore[method-assign]
    try:
        with LargeOnMeta():
            yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
        torch.nn.Module.register_buffer = register_buffer  # type: ignore[method-assign]
        _HERE.is_bare = False


def _num_elements(args: Sequence[Any], given: Mapping[str, Any]) -> int:
    """Return how many elements `torch.empty` makes with these arguments."""
    size = given.get("size", args[0] if len(args) == 1 and not isinstance(args[0], int) else args)
    return math.prod(int(one) for one in size)
