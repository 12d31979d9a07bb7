"""Fallback for an engine that fails: the loop, the simplest engine, continues in its place.

With `auto` the caller wants a result, not a certain engine. Clients with an answer from the engine are not
trained again; the loop trains the others, and all later rounds.
Invariant: each client of a cohort is counted once, and every fallback is reported.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

from edgefl.logs import event
from edgefl.records import Answer, Partial, Plan, Traffic
from edgefl.simulation.engines.fleets import Engine, SimulationSetup
from edgefl.simulation.engines.loop import LoopFleet
from edgefl.task import MAX_QUOTED

_log = logging.getLogger(__name__)

OnFallback = Callable[[str], None]  # why


class Attempt:
    """A context around an engine: its exception is reported, stored as `fault`, and suppressed."""

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self.fault = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, raised: BaseException | None, _: TracebackType | None) -> bool:
        if not isinstance(raised, Exception):  # Ctrl-C and the end of a generator are not an engine's fault
            return False
        self.fault = f"it failed: {type(raised).__name__}: {raised}".rstrip(": ")[:MAX_QUOTED]
        event(_log, logging.WARNING, "engine.failed", engine=self._engine, fault=self.fault)
        return True


class Sheltered:
    """An engine with the loop as its fallback."""

    def __init__(self, setup: SimulationSetup, engine: Engine, name: str) -> None:
        self._setup, self._name = setup, name
        self.on_fallback: OnFallback = lambda _why: None
        self._engine, self._spent = engine, Traffic()  # of an engine that has failed

    @property
    def peak_rss_mb(self) -> float:
        """Return the peak memory of the engine's processes."""
        return float(getattr(self._engine, "peak_rss_mb", 0.0))

    def clients(self) -> Sequence[str]:
        return self._setup.population.names()

    def collect(self, plan: Plan) -> Iterator[Answer]:
        if isinstance(self._engine, LoopFleet):
            yield from self._engine.collect(plan)
            return
        answered: set[str] = set()
        with Attempt(self._name) as attempt:
            for answer in self._engine.collect(plan):
                answered.update(answer.contributors if isinstance(answer, Partial) else (answer.device,))
                yield answer
        if not attempt.fault:
            return
        self._fall_back(f"{self._name} until round {plan.round}: {attempt.fault}")
        left = tuple(client for client in plan.clients if client not in answered)
        yield from self._engine.collect(dataclasses.replace(plan, clients=left))

    def traffic(self) -> Traffic:
        return self._spent + self._engine.traffic()

    def close(self) -> None:
        """Close the current engine."""
        self._engine.close()

    def _fall_back(self, why: str) -> None:
        self._spent = self._engine.traffic()
        self._engine.close()
        self._engine = LoopFleet(self._setup)
        self.on_fallback(why)
