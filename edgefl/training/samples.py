"""A device's samples: call the user's loader, check its result and convert it to tensors.

Inputs and targets are one array each, or structures of arrays (`edgefl.training.structures`): a tuple or a dict is a
structure, while a list is one array, sample by sample, as numpy reads it.
Invariant: a `Samples` has at least one sample, and all its tensors have the same first dimension.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from edgefl.errors import MissingExtra, TaskError
from edgefl.task import Task, UserCode
from edgefl.training.randomness import seeded
from edgefl.training.structures import INPUT, TARGET, Structure, described, leaves, mapped
from edgefl.trees import is_float
from edgefl.trees.tensors import tensor_of

if TYPE_CHECKING:
    import torch

_NUMBERS = "fiub"  # numpy kinds: floats, integers, booleans


@dataclass(frozen=True, slots=True)
class Samples:
    """Inputs and targets of equal first dimension, on the device that computes."""

    inputs: Structure  # of tensors, (N, ...) each
    targets: Structure  # of tensors, (N, ...) each

    def __len__(self) -> int:
        return len(leaves(self.inputs)[0])

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        device: torch.device = leaves(self.inputs)[0].device
        return device

    def chosen(self, which: torch.Tensor | slice) -> Samples:
        """Return the samples at these positions, an integer tensor on `device`, or of this slice."""
        return Samples(mapped(lambda one: one[which], self.inputs), mapped(lambda one: one[which], self.targets))

    def chunks(self, size: int) -> Iterator[Samples]:
        """Yield the samples in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.chosen(slice(start, start + size))


def require_torch(feature: str, extra: str = "train") -> None:
    """Raise MissingExtra if torch is not installed."""
    try:
        import torch  # noqa: F401 - to see that it is there
    except ImportError as cause:
        raise MissingExtra(feature, extra) from cause


def computing_device() -> torch.device:
    """Return the device for computing: the GPU if there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train_samples(task: Task, options: Mapping[str, str], *, seed: int = 0) -> Samples:
    """Return this device's own samples; the global random states are seeded for the loader.

    Raises TaskError if there are none or they cannot be used.
    """
    if task.train_data is None:
        raise TaskError(f"task {task.name!r} has no train_data")
    with seeded(seed):
        return _load(task, task.train_data, "train_data", options)


def test_samples(task: Task, options: Mapping[str, str]) -> Samples:
    """Return the held-out samples; raises TaskError if there are none or they cannot be used."""
    if task.test_data is None:
        raise TaskError(f"task {task.name!r} has no test_data")
    with seeded(0):
        return _load(task, task.test_data, "test_data", options)


def _load(task: Task, loader: Callable[..., Any], what: str, options: Mapping[str, str]) -> Samples:
    _refuse_options(task, loader, what, options)
    with UserCode(task.name, what):
        loaded = loader(**options)
    if not isinstance(loaded, (tuple, list)) or len(loaded) != 2:
        seen = f"{len(loaded)} values" if isinstance(loaded, (tuple, list)) else type(loaded).__name__
        raise TaskError(f"task {task.name!r}: {what} returned {seen}, not (inputs, targets)")
    inputs, targets = (_structure(task, f"{what}'s {name}", value) for name, value in zip(_PARTS, loaded, strict=True))
    num_inputs, num_targets = _number_of(task, what, inputs, INPUT), _number_of(task, what, targets, TARGET)
    if num_inputs != num_targets:
        raise TaskError(
            f"task {task.name!r}: {what} returned {num_inputs} inputs but {num_targets} targets: "
            f"{described(inputs, INPUT)}; {described(targets, TARGET)}"
        )
    if num_inputs == 0:
        told = ", ".join(f"{key}={value}" for key, value in options.items()) or "none"
        raise TaskError(
            f"task {task.name!r}: the device has no data: {what} returned 0 samples (options: {told}). "
            "Check `edgefl agent start --data`."
        )
    return Samples(inputs, targets)


_PARTS = ("inputs", "targets")


def _number_of(task: Task, what: str, structure: Structure, base: str) -> int:
    """Return the first dimension that all tensors have; raises TaskError if they differ."""
    numbers = {len(one) for one in leaves(structure)}
    if len(numbers) == 1:
        return numbers.pop()
    raise TaskError(
        f"task {task.name!r}: {what} returned {described(structure, base)}: the first dimension counts the samples, "
        "and must be the same for all"
    )


def _is_in_float64(task: Task) -> bool:
    """Whether the task's model has float64 parameters: then its samples stay in float64, too."""
    if task.model is None:
        return False
    with seeded(0), UserCode(task.name, "model"):
        return _makes_float64(task.model)


@lru_cache(maxsize=16)  # one model for all clients of a simulation
def _makes_float64(make: Callable[[], torch.nn.Module]) -> bool:
    import torch

    return any(one.dtype == torch.float64 for one in make().parameters())


@lru_cache(maxsize=16)  # a simulation loads the data of a thousand clients with one loader
def _signature(loader: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(loader)
    except ValueError:  # some builtins have no signature
        return None


def _refuse_options(task: Task, loader: Callable[..., Any], what: str, options: Mapping[str, str]) -> None:
    signature = _signature(loader)
    if signature is None:
        return
    try:
        signature.bind(**options)
    except TypeError as cause:
        raise TaskError(
            f"task {task.name!r}: {what}{signature} cannot take the data options {dict(options)}: {cause}. "
            "Check `edgefl agent start --data`."
        ) from cause


def _structure(task: Task, what: str, value: Any) -> Structure:
    """Return the structure of tensors that a loader returned as arrays."""
    if isinstance(value, Mapping):
        if not value:
            raise TaskError(f"task {task.name!r}: {what} are an empty dict, without any tensor")
        return {key: _structure(task, f"{what}[{key!r}]", one) for key, one in value.items()}
    if isinstance(value, tuple) and _has_arrays(value):
        parts = [_structure(task, f"{what}[{n}]", one) for n, one in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return _tensor(task, what, value)


def _has_arrays(value: tuple[Any, ...]) -> bool:
    """Whether a tuple is a structure, and not one array written in numbers."""
    return any(
        _has_arrays(one) if isinstance(one, tuple) else isinstance(one, Mapping) or hasattr(one, "__array__")
        for one in value
        if not isinstance(one, np.generic)
    )


def _tensor(task: Task, what: str, value: Any) -> torch.Tensor:
    import torch

    tensor: torch.Tensor
    if isinstance(value, torch.Tensor):
        tensor = value.detach()
    else:
        with UserCode(task.name, f"reading {what}"):
            array = np.asarray(value)
        if array.dtype.kind not in _NUMBERS and not is_float(array.dtype):
            raise TaskError(
                f"task {task.name!r}: {what} are {array.dtype} and not numbers (real ones, integers or booleans)"
            )
        if array.dtype == np.float64 and not _is_in_float64(task):  # numpy's default, but rare in models
            array = array.astype(np.float32)
        with UserCode(task.name, f"reading {what}"):
            tensor = tensor_of(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))
    if tensor.dim() == 0:
        raise TaskError(f"task {task.name!r}: {what} are a single number; their first dimension counts the samples")
    return tensor.to(computing_device())
