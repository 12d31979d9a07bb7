"""A worker process of the pool, and the shared memory for its sums."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Iterator

import numpy as np

from edgefl.errors import ConfigError
from edgefl.process.workers.messages import Ready, Reply
from edgefl.process.workers.process import WorkerProcess
from edgefl.simulation.engines.fleets import SimulationSetup
from edgefl.simulation.engines.pool.messages import Summed, pickled_task
from edgefl.simulation.engines.pool.worker import PoolStart
from edgefl.simulation.engines.shared import SharedTree
from edgefl.trees import TensorSpec, Tree, spec_of


class TrainingProcess(WorkerProcess):
    """A worker process with its sums in shared memory."""

    def __init__(self, start: bytes, descriptors: tuple[int, ...], sums: SharedTree) -> None:
        super().__init__(start, descriptors=descriptors)
        self._sums = sums

    def receive(self) -> Ready | Reply:
        said = super().receive()
        if isinstance(said, Ready) or not isinstance(said.answer, Summed) or said.answer.partial is None:
            return said
        total = {name: array.copy() for name, array in self._sums.tree.items()}  # the memory may be overwritten soon
        partial = dataclasses.replace(said.answer.partial, total=total)
        return dataclasses.replace(said, answer=dataclasses.replace(said.answer, partial=partial))


def launcher(
    setup: SimulationSetup, parameters: SharedTree, frozen: SharedTree, sums: SharedTree
) -> Callable[[], TrainingProcess]:
    """Return a function that starts workers on this memory; raises ConfigError if something cannot be sent."""
    start = PoolStart(
        reference=setup.reference,
        task=pickled_task(setup),
        make_population=setup.make_population,
        config=setup.config,
        states=setup.states,
        spec=spec_of(parameters.tree),
        frozen_spec=spec_of(frozen.tree),
        parameters=parameters.descriptor,
        frozen=frozen.descriptor,
        sums=sums.descriptor,
    )
    try:
        pickled = pickle.dumps(start)
    except (pickle.PicklingError, AttributeError, TypeError) as cause:
        raise ConfigError(f"the population cannot be sent to worker processes: {cause}") from cause
    return lambda: TrainingProcess(pickled, (parameters.descriptor, frozen.descriptor, sums.descriptor), sums)


def memory_for(parameters: Tree, frozen: Tree, num_workers: int) -> Iterator[SharedTree]:
    """Open shared memory for parameters, for frozen tensors, and for each worker's sum in float64."""
    spec = spec_of(parameters)
    yield SharedTree(spec)
    yield SharedTree(spec_of(frozen))
    for _ in range(num_workers):
        yield SharedTree({name: TensorSpec(one.shape, np.dtype(np.float64)) for name, one in spec.items()})
