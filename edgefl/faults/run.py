"""Runs one seed and returns its verdict: the simulation, and the audit of what it wrote down."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from edgefl.faults.auditor import AuditedRun, audit
from edgefl.faults.fleet import TOPOLOGIES, first_parameters, make_homes
from edgefl.faults.machine import substitutes
from edgefl.faults.plan import Settings
from edgefl.faults.world import World
from edgefl.records import RoundOutcome
from edgefl.trees import write_tree

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a folder in memory, if there is one


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What came of one seed."""

    settings: Settings
    wrong: tuple[str, ...]
    digest: str  # of the trace
    virtual_s: float
    num_steps: int
    num_messages: int
    num_trained: int
    faults: Counter[str] = field(default_factory=Counter)
    trace: tuple[str, ...] = ()


class Simulator:
    """Runs seeds one after another in this process; within its block, the programs' modules are the simulation's."""

    def __init__(self, topologies: Sequence[str] = tuple(TOPOLOGIES)) -> None:
        self._topologies = topologies
        self._exit = contextlib.ExitStack()
        self._world: World | None = None

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="edgefl-faults-", dir=_folder_in_memory()))
        self._exit.callback(shutil.rmtree, self._folder, ignore_errors=True)
        for name in self._topologies:
            make_homes(TOPOLOGIES[name], self._folder / name)
        self._exit.enter_context(substitutes.installed(self))
        self._exit.enter_context(_log_level())
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def run(self, settings: Settings, *, traced: bool = False) -> Verdict:
        """Run a seed."""
        with _garbage_is_ours():
            return self._verdict(settings, traced=traced)  # the world is garbage when this returns

    def _verdict(self, settings: Settings, *, traced: bool) -> Verdict:
        world = World(settings, self._folder / settings.topology, self._folder / "run", traced=traced)
        root = logging.getLogger()
        handlers, root.handlers = root.handlers, [world]
        self._world = world
        try:
            with substitutes.entered(world.network):
                try:
                    world.run()
                    wrong = audit(_run_of(world))
                finally:
                    world.end()
        finally:
            root.handlers, self._world = handlers, None
        return Verdict(
            settings=settings, wrong=tuple(wrong), digest=world.digest(), virtual_s=world.kernel.now_s,
            num_steps=world.kernel.num_steps, num_messages=world.network.num_messages,
            num_trained=sum(one["kind"] == "trained" for one in world.log), faults=world.counts,
            trace=tuple(world.trace),
        )  # fmt: skip

    def trainer(self, *options: object) -> Any:
        """Make the trainer of the device that starts in the present run."""
        if self._world is None:
            raise RuntimeError("no simulation runs")
        return self._world.trainer(*options)

    def outcome(self, outcome: RoundOutcome) -> None:
        """Take what a round of the present run has come to."""
        if self._world is not None:
            self._world.outcome(outcome)


def _run_of(world: World) -> AuditedRun:
    """Return what the auditor needs to know of a run."""
    settings, result, first = world.settings, world.result(), first_parameters()
    file = io.BytesIO()
    write_tree(first, file)
    return AuditedRun(
        log=world.log, state=result["job"]["state"], rounds=settings.rounds, outcomes=result["outcomes"],
        models=result["models"], first=first, first_name=hashlib.sha256(file.getvalue()).hexdigest(),
        factor=settings.server_lr * (-1.0 if settings.algorithm == "fedsgd" else 1.0), ended_s=world.ended_s,
        last_fault_s=world.last_fault_s, last_short_fault_s=world.last_short_fault_s, reaches=world.reaches(),
        num_faults=len(settings.faults), waits_for_all=settings.waits_for_all,
        keeps_parents=settings.keeps_parents, region_rounds=settings.region_rounds,
        problems=tuple(world.kernel.problems),
    )  # fmt: skip


@contextlib.contextmanager
def _garbage_is_ours() -> Iterator[None]:
    """Collect what the block leaves at its end, not before: no cycle collector runs code of dead nodes in between.

    What they held open is no mistake of theirs, they were killed.
    """
    was_enabled, hook = gc.isenabled(), sys.unraisablehook
    gc.disable()
    gc.freeze()  # all that is here already need not be looked through
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            yield
        finally:
            sys.unraisablehook = lambda _: None
            gc.collect()
            gc.collect()  # what the first one's finalizers have let go
            sys.unraisablehook = hook
            gc.unfreeze()
            if was_enabled:
                gc.enable()


@contextlib.contextmanager
def _log_level() -> Iterator[None]:
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.setLevel(before)


def _folder_in_memory() -> Path | None:
    return _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None
