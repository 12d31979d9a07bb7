"""Samples that are read when a batch needs them, from a map-style Dataset of torch or one that looks like it.

torch's DataLoader reads, in this process or in `train.workers` others, and yields batches in their order. Random
numbers that the user's code draws from the global states while it reads depend on the seed and the batch's number.
Invariant: a batch does not depend on the number of workers, and reading changes no random state of the training; so a
Dataset gives the same update as arrays of the same data.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgefl.errors import TaskError, out_of_memory
from edgefl.task import Task, UserCode
from edgefl.training.data.items import Source, batch_of, refuse_other_form
from edgefl.training.data.reading import keeps_float64
from edgefl.training.data.sample_set import Samples, computing_device
from edgefl.training.randomness import kept, seed_all
from edgefl.training.structures import mapped

if TYPE_CHECKING:
    import torch

    from edgefl.trees import Array


def is_dataset(task: Task, what: str, loaded: Any) -> bool:
    """Whether a loader returned a map-style Dataset: it has a length and items, and is no array or mapping of them.

    Raises TaskError for a Dataset that can only be iterated.
    """
    from torch.utils.data import IterableDataset

    if isinstance(loaded, IterableDataset):
        raise TaskError(
            f"task {task.name!r}: {what} returned a {type(loaded).__name__}, which can only be iterated; expected a "
            "map-style Dataset, with __len__ and __getitem__: a round shuffles the samples and counts them"
        )
    if isinstance(loaded, (tuple, list, str, bytes, Mapping)) or hasattr(loaded, "__array__"):
        return False
    return hasattr(loaded, "__len__") and hasattr(loaded, "__getitem__")


@dataclass(frozen=True, slots=True)
class DatasetSamples:
    """Samples of a Dataset, read batch by batch."""

    source: Source
    positions: Array  # (N,) integers: which of the Dataset's items

    @staticmethod
    def of(source: Source) -> DatasetSamples:
        """Return all samples of a Dataset."""
        with UserCode(source.task.name, f"the length of {source.what}'s Dataset"):
            number = len(source.dataset)
        keeps_float64(source.task)  # makes a model, which no worker should have to
        return DatasetSamples(source, np.arange(number))

    @property
    def device(self) -> torch.device:
        """The CPU, where positions are."""
        import torch

        return torch.device("cpu")

    def __len__(self) -> int:
        return len(self.positions)

    def batches(self, order: Iterable[torch.Tensor], seed: int) -> Iterator[Samples]:
        """Yield a batch for each tensor of positions; raises TaskError for what cannot be read or is no batch."""
        source, device = self.source, computing_device()
        wanted = (self.positions[which.numpy()].tolist() for which in order)
        with UserCode(source.task.name, f"reading {source.what}"):
            reading = _started(_Reader(source, seed), wanted)
        first: Samples | None = None
        while True:
            with UserCode(source.task.name, f"reading {source.what}"):
                batch = next(reading, None)
            if batch is None:
                return
            if isinstance(batch, _Fault):
                raise batch.error()
            first = first or batch
            refuse_other_form(source, first, batch)
            yield Samples(*(mapped(lambda one: one.to(device), part) for part in (batch.inputs, batch.targets)))

    def chunks(self, size: int) -> Iterator[Samples]:
        """Yield the samples in order, `size` at a time."""
        import torch

        starts = range(0, len(self), size)
        return self.batches((torch.arange(start, min(start + size, len(self))) for start in starts), 0)

    def chosen(self, which: torch.Tensor | slice) -> DatasetSamples:
        """Return the samples at these positions, or of this slice; nothing is read."""
        return DatasetSamples(self.source, self.positions[which if isinstance(which, slice) else which.numpy()])

    def first(self, size: int) -> Samples:
        """Read the first samples, `size` or all, in this process."""
        here = DatasetSamples(dataclasses.replace(self.source, workers=0), self.positions[:size])
        return next(here.chunks(size))


@dataclass(frozen=True, slots=True)
class _Fault:
    """Why a batch could not be read: an exception as a value, as workers return it."""

    reason: str
    out_of_memory: bool

    def error(self) -> TaskError:
        """Return the error, which the trainer knows as out of memory by its cause."""
        error = TaskError(self.reason)
        if self.out_of_memory:
            error.__cause__ = MemoryError()
        return error


_Job = tuple[int, Sequence[int]]  # the batch's number, and its items


@dataclass(frozen=True, slots=True)
class _Reader:
    """What torch's DataLoader takes for its Dataset: its items are our batches."""

    source: Source
    seed: int

    def __getitem__(self, job: _Job) -> Samples | _Fault:
        number, positions = job
        try:
            with nullcontext() if _in_worker() else kept():
                seed_all(_seed_of(self.seed, number))
                return batch_of(self.source, self._items(positions), positions)
        except TaskError as error:
            return _Fault(str(error), out_of_memory(error))

    def _items(self, positions: Sequence[int]) -> Sequence[Any]:
        source = self.source
        together = getattr(source.dataset, "__getitems__", None)  # as torch's DataLoader prefers it
        with UserCode(source.task.name, f"reading item {positions[0]} of {source.what}'s Dataset"):
            if together is not None:
                items = together(list(positions))
                if isinstance(items, Sequence) and len(items) == len(positions):
                    return items
            return [source.dataset[position] for position in positions]


def _started(reader: _Reader, wanted: Iterable[Sequence[int]]) -> Iterator[Samples | _Fault]:
    """Return the batches of a DataLoader; its workers end with the iterator."""
    import torch
    from torch.utils.data import DataLoader

    workers = reader.source.workers
    forks = workers and "fork" in multiprocessing.get_all_start_methods()
    with warnings.catch_warnings():
        # From Python 3.12 on. The other threads only wait, and a worker uses one thread.
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        # The number of workers is the job's, for devices of any number of cores; and they may wait for a disk.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        loader: Any = DataLoader(
            reader,  # type: ignore[arg-type]  # it has items, which is all that is needed
            batch_size=None,
            sampler=enumerate(wanted),
            collate_fn=_as_it_is,
            num_workers=workers,
            generator=torch.Generator(),  # for a seed that nobody uses: the global state stays as it is
            multiprocessing_context="fork" if forks else None,  # a task need not be picklable
        )
        return iter(loader)


def _as_it_is(batch: Any) -> Any:
    return batch


def _in_worker() -> bool:
    from torch.utils.data import get_worker_info

    return get_worker_info() is not None


def _seed_of(seed: int, number: int) -> int:
    """Return the seed of a batch: the same in every process."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0] >> np.uint64(1))
