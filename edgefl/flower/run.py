"""Run a Flower app on this machine: its ServerApp in this thread, its ClientApps by a runner of ours.

No Ray, no SuperLink, no process a message.
Invariant: a run in which all training failed raises; Flower would call it finished.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgefl.errors import ConfigError, QuorumNotMet
from edgefl.flower.app import KIND, FlowerApp, RunConfigValue, fuse_run_config, require_flower
from edgefl.operator.run import peak_rss_mb
from edgefl.simulation.interrupt import set_by_interrupt
from edgefl.simulation.participation import Counts, clients_by_rounds, count, no_counts
from edgefl.task import UserCode

if TYPE_CHECKING:
    from flwr.app import ArrayRecord

    from edgefl.flower.watch import Watch

Json = dict[str, Any]

MAX_REASONS = 5  # quoted in an error
_RUN_IDS = itertools.count(1)
_RUNNING = threading.Lock()  # Flower's task identity belongs to the whole process


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowerRunResult:
    """What a run of a Flower app came to."""

    app: str
    rounds: tuple[Json, ...]
    final: dict[str, float]  # metrics of the last round
    seconds: float  # of the ServerApp
    num_clients: int  # that did their part, summed over the rounds
    num_workers: int  # processes that trained; 0 = all was done in this one
    peak_rss_mb: float  # of this process and its workers
    arrays: ArrayRecord | None  # of the last strategy that returned a Result
    state: Mapping[str, Any] = field(default_factory=dict)  # the ServerApp's context.state
    interrupted: bool = False  # ended by Ctrl-C
    took_part: Counts = field(default_factory=lambda: no_counts(0))  # rounds of each node, by its partition

    def as_json(self) -> Json:
        """The result with the keys that every engine's result has."""
        return {
            "engine": "flower",
            "app": self.app,
            "workers": self.num_workers,
            "rounds": list(self.rounds),
            "final": self.final,
            "seconds": self.seconds,
            "clients_per_second": self.num_clients / self.seconds if self.seconds > 0 else 0.0,
            "peak_rss_mb": self.peak_rss_mb,
            "model": None,
            "interrupted": self.interrupted,
            "clients_by_rounds": clients_by_rounds(self.took_part),
        }


def run_flower_app(
    app: FlowerApp, num_supernodes: int | None = None, run_config: Mapping[str, RunConfigValue] | None = None, *,
    workers: int | None = None, on_round: Callable[[Json], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> FlowerRunResult:  # fmt: skip
    """Run an app's ServerApp to its end, with so many nodes (the app's own number where none is given).

    `run_config` overrides the app's; `on_round` hears of each round as its messages showed it. `workers`
    is the number of processes that train: 0 for this one alone; where none is given, this one alone at
    first, and one a core once that has taken as long as starting them would. Ctrl-C ends the round with who
    has answered and returns what there is.
    Raises ConfigError, TaskError where the ServerApp raises, QuorumNotMet where all training failed.
    """
    require_flower("a Flower app")
    from flwr.app import Context, RecordDict

    from edgefl.flower.grid import LocalGrid
    from edgefl.flower.inside import listening, logging_from, task_identity
    from edgefl.flower.nodes import Nodes
    from edgefl.flower.outcome import arrays_of, metrics_of
    from edgefl.flower.runners import Runners
    from edgefl.flower.watch import Watch

    config = fuse_run_config(app, run_config or {})
    run_id, watch, stop = next(_RUN_IDS), Watch(clock, on_round), threading.Event()
    nodes = Nodes(run_id, app.num_supernodes if num_supernodes is None else num_supernodes, config)
    runners = Runners(app, workers, clock)
    grid = LocalGrid(run_id, nodes, runners, watch, stop)
    context = Context(run_id=run_id, node_id=0, node_config={}, state=RecordDict(), run_config=dict(config))
    if not _RUNNING.acquire(blocking=False):
        raise ConfigError("a Flower app is already running in this process; start another process for the next")
    start_s = clock()
    with ExitStack() as stack:
        stack.callback(_RUNNING.release)
        stack.enter_context(runners)
        stack.callback(grid.close)
        stack.enter_context(task_identity(run_id))
        stack.enter_context(logging_from(logging.WARNING))
        heard = stack.enter_context(listening())
        stack.enter_context(set_by_interrupt(stop))
        try:
            with UserCode(app.name, "its ServerApp", KIND):
                app.server_app(grid, context)
                grid.finish()
        except KeyboardInterrupt:  # the grid's, where the next round would have begun; or the second Ctrl-C
            stop.set()
        watch.finish()
        seconds = clock() - start_s
    _refuse_silence(app, watch)
    told = metrics_of(heard)
    rounds = tuple(seen.as_json(told.get(seen.number)) for seen in watch.rounds)
    last = told[max(told)] if told else {}
    return FlowerRunResult(
        app=app.name,
        rounds=rounds,
        final={**(rounds[-1]["metrics"] if rounds else {}), **last},
        seconds=seconds,
        num_clients=sum(seen.num_admitted for seen in watch.rounds),
        num_workers=runners.num_workers,
        peak_rss_mb=peak_rss_mb() + runners.workers_peak_rss_mb,
        arrays=arrays_of(heard),
        state=context.state,
        interrupted=stop.is_set(),
        took_part=_took_part(watch, len(nodes.ids())),
    )


def _took_part(watch: Watch, num_nodes: int) -> Counts:
    counts = no_counts(num_nodes)
    for seen in watch.rounds:
        count(counts, (int(node.rpartition("-")[2]) for node in seen.participants))
    return counts


def _refuse_silence(app: FlowerApp, watch: Watch) -> None:
    reasons = list(watch.failures())
    if reasons and not any(seen.num_admitted for seen in watch.rounds):
        more = f"; and {len(reasons) - MAX_REASONS} more" if len(reasons) > MAX_REASONS else ""
        raise QuorumNotMet(
            f"{KIND} {app.name!r}: every client failed, in every round. {'; '.join(reasons[:MAX_REASONS])}{more}"
        )
