"""A device's samples: call the user's loader, check its result, and convert it to tensors or keep it as a Dataset.

Inputs and targets are one array each, or structures of arrays (`edgefl.training.structures`): a tuple or a dict is a
structure, while a list is one array, sample by sample, as numpy reads it.
Invariant: a `SampleSet` has at least one sample, and all its tensors have the same first dimension.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from edgefl.errors import MissingExtra, TaskError
from edgefl.task import Task, UserCode
from edgefl.training.data.dataset import DatasetSamples, is_dataset
from edgefl.training.data.items import Source
from edgefl.training.data.reading import num_samples, pair_of, tensors_of
from edgefl.training.data.sample_set import Samples, SampleSet, computing_device
from edgefl.training.randomness import seeded
from edgefl.training.structures import mapped

__all__ = ["SampleSet", "Samples", "computing_device", "eval_samples", "require_torch", "test_samples", "train_samples"]


def require_torch(feature: str, extra: str = "train") -> None:
    """Raise MissingExtra if torch is not installed."""
    try:
        import torch  # noqa: F401 - to see that it is there
    except ImportError as cause:
        raise MissingExtra(feature, extra) from cause


def train_samples(task: Task, options: Mapping[str, str], *, seed: int = 0, workers: int = 0) -> SampleSet:
    """Return this device's own samples; the global random states are seeded for the loader.

    `workers` processes read a Dataset; with 0, this one does. Raises TaskError if there are no samples or they cannot
    be used.
    """
    if task.train_data is None:
        raise TaskError(f"task {task.name!r} has no train_data")
    with seeded(seed):
        return _load(task, task.train_data, "train_data", options, workers)


def test_samples(task: Task, options: Mapping[str, str], *, workers: int = 0) -> SampleSet:  # noqa: PT028 - no test
    """Return the held-out samples; raises TaskError if there are none or they cannot be used."""
    if task.test_data is None:
        raise TaskError(f"task {task.name!r} has no test_data")
    with seeded(0):
        return _load(task, task.test_data, "test_data", options, workers)


def eval_samples(task: Task, options: Mapping[str, str], *, seed: int = 0, workers: int = 0) -> SampleSet:
    """Return this device's own held-out samples; raises TaskError if there are none or they cannot be used."""
    if task.eval_data is None:
        raise TaskError(f"task {task.name!r} has no eval_data")
    with seeded(seed):
        return _load(task, task.eval_data, "eval_data", options, workers)


def _load(task: Task, loader: Callable[..., Any], what: str, options: Mapping[str, str], workers: int) -> SampleSet:
    _refuse_options(task, loader, what, options)
    with UserCode(task.name, what):
        loaded = loader(**options)
    if is_dataset(task, what, loaded):
        samples = DatasetSamples.of(Source(task=task, what=what, dataset=loaded, workers=workers))
        if len(samples) == 0:
            raise _no_data(task, what, options)
        return samples
    inputs, targets = pair_of(task, what, loaded, "(inputs, targets) or a Dataset")
    parts = [tensors_of(task, f"{what}'s {name}", value) for name, value in (("inputs", inputs), ("targets", targets))]
    if num_samples(task, what, *parts) == 0:
        raise _no_data(task, what, options)
    device = computing_device()
    return Samples(*(mapped(lambda one: one.to(device), part) for part in parts))


def _no_data(task: Task, what: str, options: Mapping[str, str]) -> TaskError:
    told = ", ".join(f"{key}={value}" for key, value in options.items()) or "none"
    return TaskError(
        f"task {task.name!r}: the device has no data: {what} returned 0 samples (options: {told}). "
        "Check `edgefl agent start --data`."
    )


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
