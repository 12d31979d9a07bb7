"""From the items of a Dataset to a batch: by the task's `collate`, or stacked as torch's `default_collate` does.

Invariant: all tensors of a batch have as many rows as there are items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgefl.errors import TaskError
from edgefl.task import Task, UserCode
from edgefl.training.data.reading import num_samples, pair_of, tensors_of
from edgefl.training.data.sample_set import Samples
from edgefl.training.structures import INPUT, TARGET, Structure, described, flattened, mapped


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A Dataset and how it is read."""

    task: Task
    what: str  # which of the task's loaders returned it
    dataset: Any
    workers: int = 0  # processes; 0 = this one


def batch_of(source: Source, items: Sequence[Any], positions: Sequence[int]) -> Samples:
    """Return the items at these positions as one batch, on the CPU; raises TaskError for what does not fit."""
    task, what = source.task, source.what
    if task.collate is None:
        pairs = [_pair(source, item, position) for item, position in zip(items, positions, strict=True)]
        return Samples(*(_stacked(source, [pair[n] for pair in pairs], positions, n) for n in range(2)))
    with UserCode(task.name, "collate"):
        loaded = task.collate(list(items))
    parts = [
        tensors_of(task, f"collate's {name}", value, lists=True)
        for name, value in zip(("inputs", "targets"), pair_of(task, "collate", loaded), strict=True)
    ]
    number = num_samples(task, "collate", *parts)
    if number != len(items):
        shapes = f"{described(parts[0], INPUT)}; {described(parts[1], TARGET)}"
        raise TaskError(
            f"task {task.name!r}: collate returned {number} samples for {len(items)} items of {what}'s Dataset: "
            f"{shapes}"
        )
    return Samples(*parts)


def _pair(source: Source, item: Any, position: int) -> tuple[Any, Any]:
    """Return an item's inputs and targets."""
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return item[0], item[1]
    seen = f"a {type(item).__name__}"
    if isinstance(item, Mapping):
        seen = f"a dict of {', '.join(map(str, item))}"
    elif isinstance(item, (tuple, list)):
        seen = f"{len(item)} values"
    raise TaskError(
        f"task {source.task.name!r}: item {position} of {source.what}'s Dataset is {seen}, not (inputs, targets). Give "
        "the task a collate, which makes (inputs, targets) of a list of items"
    )


def _stacked(source: Source, values: Sequence[Any], positions: Sequence[int], part: int) -> Structure:
    """Return the inputs or targets of several items as one structure, as torch's `default_collate` does."""
    from torch.utils.data import default_collate

    name, base = (("inputs", INPUT), ("targets", TARGET))[part]
    what = f"item {{}} of {source.what}'s Dataset"
    items = [
        tensors_of(source.task, f"{what.format(position)}: its {name}", value, lists=True)
        for value, position in zip(values, positions, strict=True)
    ]
    first, *others = items
    for other, position in zip(others, positions[1:], strict=True):
        if _kinds(other) != _kinds(first):
            raise TaskError(
                f"task {source.task.name!r}: the {name} of {what.format(positions[0])} are {described(first, base)}, "
                f"those of item {position} {described(other, base)}: they do not fit into one batch. Give the task a "
                "collate, which may pad them"
            )
    return mapped(lambda *parts: default_collate(list(parts)), first, *others)


def _kinds(structure: Structure) -> tuple[Any, ...]:
    tensors, form = flattened(structure)
    return (form, *((one.shape, one.dtype) for one in tensors))


def refuse_other_form(source: Source, first: Samples, batch: Samples) -> None:
    """Raise TaskError for a batch of another structure, or other dtypes, than the first one; shapes may differ."""
    (some, form), (others, other_form) = (flattened((one.inputs, one.targets)) for one in (first, batch))
    types, other_types = ([getattr(one, "dtype", None) for one in tensors] for tensors in (some, others))
    if form == other_form and types == other_types:
        return
    told, seen = (f"{described(one.inputs, INPUT)}; {described(one.targets, TARGET)}" for one in (first, batch))
    raise TaskError(
        f"task {source.task.name!r}: the batches of {source.what}'s Dataset differ in structure or dtype: first "
        f"{told}, then {seen}"
    )
