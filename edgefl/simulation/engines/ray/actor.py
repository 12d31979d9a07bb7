"""The actor that runs on a cluster, with one CPU and one torch thread; it trains the clients that it gets.

The task is sent with it, as a bundle, unless it is on the same machine. edgefl itself, and packages that the
task imports, must be installed on each node.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import secrets
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from edgefl.bundle import load_bundle, pack_bundle, unpack_bundle
from edgefl.config import JobConfig
from edgefl.errors import ConfigError, EdgeflError
from edgefl.measure import own_peak_mb
from edgefl.process.workers.messages import Ready, Reply
from edgefl.simulation.engines.fleets import PopulationMaker, SimulationSetup
from edgefl.simulation.engines.pool.chunks import ChunkTrainer
from edgefl.simulation.engines.pool.messages import BeginRound, Chunk, Flush, import_path, pickled_task
from edgefl.task import Task, load_task
from edgefl.training.local import set_threads
from edgefl.training.randomness import seeded
from edgefl.trees import Tree


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorStart:
    """What an actor needs at its start. The task is a bundle, a reference, or pickled."""

    reference: str  # of the task; inside the bundle, if there is one
    bundle: bytes | None
    pickled: bytes | None
    make_population: bytes  # pickled: its module may be in the bundle
    config: JobConfig
    import_path: tuple[str, ...]
    working_folder: str
    run: str  # a unique name of this simulation


def start_of(setup: SimulationSetup, *, here: bool) -> ActorStart:
    """Describe a simulation to actors on this machine, or anywhere; raises ConfigError if they cannot be sent."""
    bundle, reference = None, setup.reference or ""
    if setup.reference is not None and not here:
        try:
            packed = pack_bundle(setup.reference)
        except ConfigError as error:
            raise ConfigError(f"the task cannot be sent to the cluster: {error}") from error
        bundle, reference = packed.data, packed.task
    try:
        make_population = pickle.dumps(setup.make_population)
    except (pickle.PicklingError, AttributeError, TypeError) as cause:
        raise ConfigError(f"the population cannot be sent to the cluster: {cause}") from cause
    return ActorStart(
        reference=reference,
        bundle=bundle,
        pickled=pickled_task(setup),
        make_population=make_population,
        config=setup.config,
        import_path=import_path(),
        working_folder=os.fspath(Path.cwd()),
        run=secrets.token_hex(8),
    )


class Actor:
    """Made remote by Ray; its methods are called one at a time."""

    def __init__(self, start: ActorStart) -> None:
        self._start = start
        self._unpacked = f"edgefl-task-{start.run}-"  # prefix of this simulation's folders

    def ready(self) -> Ready:
        """Load the task; returns what is wrong if that fails."""
        try:
            self._trainer = self._load()
        except (EdgeflError, ImportError, AttributeError, pickle.UnpicklingError) as error:
            self.leave()
            return Ready(str(error))
        return Ready()

    def begin(self, begin: BeginRound, parameters: Tree, frozen: Tree | None = None) -> None:
        """Begin a round, with the tensors from the object store."""
        plan = dataclasses.replace(begin.plan, parameters=parameters, frozen=frozen)
        self._trainer.begin(plan, sums=begin.sums, method=begin.method)

    def answer(self, message: Chunk | Flush) -> Reply:
        return Reply(self._trainer.answer(message), own_peak_mb())

    def leave(self) -> None:
        """Remove all files unpacked on this machine, also by killed actors: all actors end together."""
        for folder in Path(tempfile.gettempdir()).glob(f"{self._unpacked}*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _load(self) -> ChunkTrainer:
        set_threads(1)
        start = self._start
        sys.path.extend(entry for entry in start.import_path if entry not in sys.path and Path(entry).exists())
        if Path(start.working_folder).is_dir():  # so that relative paths of a task or a population stay valid
            os.chdir(start.working_folder)
        task = self._task()
        maker: PopulationMaker = pickle.loads(start.make_population)  # noqa: S301 - our own driver's
        with seeded(start.config.train.seed):
            population = maker(task)
        return ChunkTrainer(task, population, start.config)

    def _task(self) -> Task:
        start = self._start
        if start.pickled is not None:
            task: Task = pickle.loads(start.pickled)  # noqa: S301 - our own driver's
            return task
        if start.bundle is None:
            return load_task(start.reference)
        own = Path(tempfile.mkdtemp(prefix=self._unpacked))
        file = own / "bundle.zip"
        file.write_bytes(start.bundle)
        unpack_bundle(file, own / "task")
        return load_bundle(own / "task", start.reference)
