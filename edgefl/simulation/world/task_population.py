"""Clients with data from the task's own loader: client i of N gets `part=i, parts=N`, as on devices.

Samples in memory are cached while they fit into `CACHE_BYTES`; beyond that the oldest are dropped and loaded again
when needed. A Dataset is asked for each time, as on a device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgefl.errors import ConfigError
from edgefl.simulation.steps import SampleCache
from edgefl.simulation.world.names import Names
from edgefl.task import Task
from edgefl.training.local import data_seed
from edgefl.training.samples import Samples, SampleSet, eval_samples, train_samples

CACHE_BYTES, EVAL_CACHE_BYTES = 1 << 30, 1 << 28


class TaskPopulation:
    """`num_clients` clients; raises ConfigError for a loader that cannot split its data."""

    def __init__(self, task: Task, num_clients: int, options: Mapping[str, str], *, seed: int = 0) -> None:
        if num_clients < 1:
            raise ConfigError(f"{num_clients} clients were asked for; expected 1 or more")
        _refuse_partless(task)
        refuse_unknown_options(task, options)
        self._task, self._seed = task, seed
        self._names = Names(num_clients)
        self._options = dict(options)
        self._cache, self._eval_cache = SampleCache(CACHE_BYTES), SampleCache(EVAL_CACHE_BYTES)

    def names(self) -> Sequence[str]:
        return self._names

    def options(self, client: str) -> dict[str, str]:
        """Return the data options of one client, as for a device."""
        return {**self._options, "part": str(self._names.index(client)), "parts": str(len(self._names))}

    def samples(self, client: str) -> SampleSet:
        kept = self._cache.get(client)
        if kept is not None:
            return kept
        seed = data_seed(self._seed, client)
        samples = train_samples(self._task, self.options(client), seed=seed)
        return self._cache.put(client, samples) if isinstance(samples, Samples) else samples

    def eval_samples(self, client: str) -> SampleSet:
        """Return a client's held-out samples, from the task's `eval_data`."""
        kept = self._eval_cache.get(client)
        if kept is not None:
            return kept
        seed = data_seed(self._seed, client)
        samples = eval_samples(self._task, self.options(client), seed=seed)
        return self._eval_cache.put(client, samples) if isinstance(samples, Samples) else samples


def refuse_unknown_options(task: Task, options: Mapping[str, str]) -> None:
    """Raise ConfigError for a data option that a loader of the task does not take.

    Checked before the first round: otherwise the loader refuses it for each client. The options of a task with `fit`
    are not known.
    """
    for what, loader in _loaders(task):
        signature = _signature(loader)
        if signature is None or _takes_anything(signature):
            continue
        known = [one.name for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_POSITIONAL]
        if unknown := [key for key in options if key not in known]:
            raise ConfigError(
                f"task {task.name!r}: {what} takes no data option {', '.join(map(repr, unknown))}; it takes "
                f"{', '.join(known) or 'none'}. Check --data, or population.data in the configuration."
            )


def _refuse_partless(task: Task) -> None:
    """A task with `fit` reads its options itself; a loader must take `part` and `parts`."""
    for what, loader in _loaders(task):
        signature = _signature(loader)
        if signature is None or _takes_anything(signature):
            continue
        if not {"part", "parts"} <= signature.parameters.keys():
            raise ConfigError(
                f"task {task.name!r}: {what}{signature} takes no `part` and `parts`, so its data cannot be split "
                "between simulated clients. Add both (strings: this client's number from 0, and the number of clients)."
            )


def _loaders(task: Task) -> list[tuple[str, Callable[..., Any]]]:
    named = (("train_data", task.train_data), ("eval_data", task.eval_data))
    return [(what, loader) for what, loader in named if loader is not None]


def _signature(loader: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(loader)
    except ValueError:  # some builtins have no signature
        return None


def _takes_anything(signature: inspect.Signature) -> bool:
    return any(one.kind is inspect.Parameter.VAR_KEYWORD for one in signature.parameters.values())
