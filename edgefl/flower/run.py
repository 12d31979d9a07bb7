"""Run a Flower app: its ServerApp in this thread, its ClientApps in our runner (on a fleet: `edgefl.flower.fleet.run`).

No Ray, no SuperLink, no process per message.
Invariant: a run in which no training message was answered raises; Flower would report success.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from edgefl.errors import ConfigError, QuorumNotMet, TaskError
from edgefl.flower.apps.app import KIND, FlowerApp, RunConfigValue, fuse_run_config, is_flower_app, require_flower
from edgefl.measure import peak_rss_mb
from edgefl.records import Counts, RoundReport, clients_by_rounds, count_clients, no_counts
from edgefl.task import UserCode
from edgefl.terminal.interrupt import set_by_interrupt

if TYPE_CHECKING:
    from flwr.app import ArrayRecord

    from edgefl.flower.internals import ResultSource
    from edgefl.flower.tracker import RoundTracker

Json = dict[str, Any]

_log = logging.getLogger(__name__)
MAX_REASONS = 5  # quoted in an error
_RUN_IDS = itertools.count(1)
_RUNNING = threading.Lock()  # Flower's task identity belongs to the whole process


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowerRunResult:
    """The result of a run of a Flower app."""

    app: str
    rounds: tuple[RoundReport, ...]
    final: dict[str, float]  # metrics of the last round
    seconds: float  # duration of the ServerApp
    num_clients: int  # clients that took part, summed over the rounds
    num_workers: int  # worker processes; 0 = all was done in this process
    peak_rss_mb: float  # of this process and its workers
    arrays: ArrayRecord | None  # the last model of a strategy, or of a legacy server or workflow
    state: Mapping[str, Any] = field(default_factory=dict)  # the ServerApp's context.state
    interrupted: bool = False  # ended by Ctrl-C
    took_part: Counts = field(default_factory=lambda: no_counts(0))  # number of rounds of each node, by its partition
    engine: str = "flower"
    job: str | None = None  # on a fleet: its relay
    model: Json | None = None  # digest and path, if it was written

    def as_json(self) -> Json:
        """Return the result with the keys common to all engines."""
        return {
            "engine": self.engine,
            "app": self.app,
            "workers": self.num_workers,
            "rounds": [one.as_json() for one in self.rounds],
            "final": self.final,
            "seconds": self.seconds,
            "clients_per_second": self.num_clients / self.seconds if self.seconds > 0 else 0.0,
            "peak_rss_mb": self.peak_rss_mb,
            "model": self.model,
            "interrupted": self.interrupted,
            "clients_by_rounds": clients_by_rounds(self.took_part),
        } | ({} if self.job is None else {"job": self.job})


def run_flower_app(  # noqa: PLR0913 - the first three are the app's, the others ours
    app: FlowerApp, num_supernodes: int | None = None, run_config: Mapping[str, RunConfigValue] | None = None, *,
    workers: int | None = None, on_round: Callable[[RoundReport], None] | None = None,
    clock: Callable[[], float] = time.monotonic, out: Path | None = None,
    node_config: Mapping[str, RunConfigValue] | None = None,
) -> FlowerRunResult:  # fmt: skip
    """Run an app's ServerApp to its end, with this many nodes (by default the app's own number).

    `run_config` overrides the app's; `on_round` is called with each round, as derived from its messages. `workers`
    is the number of processes that train: 0 for only this one; None for only this one at first, and one per core
    after as much work as their start costs; an app that was made in memory trains in this process. `out` is the path
    for the model (safetensors); `node_config` is what each node's Context holds in addition to its partition. Ctrl-C
    ends the round with the answers so far; the strategy then returns its result so far, and so does this function.
    Raises ConfigError, TaskError if the ServerApp raises, QuorumNotMet if no training message was answered.
    """
    require_flower("a Flower app")
    from flwr.app import Context, RecordDict

    from edgefl.flower.grid import LocalGrid
    from edgefl.flower.nodes import Nodes
    from edgefl.flower.runners import Runners
    from edgefl.flower.tracker import RoundTracker

    config = fuse_run_config(app, run_config or {})
    run_id, tracker, stop = next(_RUN_IDS), RoundTracker(clock, on_round), threading.Event()
    number = app.num_supernodes if num_supernodes is None else num_supernodes
    nodes = Nodes(run_id, number, config, node_config or {})
    runners = Runners(app, _workers_for(app, workers), clock)
    grid = LocalGrid(run_id, nodes, runners, tracker, stop)
    context = Context(run_id=run_id, node_id=0, node_config={}, state=RecordDict(), run_config=dict(config))
    start_s = clock()
    with ExitStack() as stack:
        sources = stack.enter_context(serving(run_id))
        stack.enter_context(runners)
        stack.callback(grid.close)
        stack.enter_context(set_by_interrupt(stop))
        try:
            with UserCode(app.name, "its ServerApp", KIND):
                app.server_app(grid, context)
                grid.finish()
        except KeyboardInterrupt:  # raised by the grid before the next round, or by a second Ctrl-C
            stop.set()
        except TaskError as error:
            grid.boundary.raise_fault(app.name)
            if not stop.is_set():
                keep_model(sources, out)
                raise_with_reasons(app, tracker, error)
            _log.warning("after the interrupt: %s", error)  # the app did not expect that its strategy ended early
        grid.boundary.raise_fault(app.name)
        tracker.finish()
        seconds = clock() - start_s
    result = result_of(
        app, tracker, sources, took_part(tracker, len(nodes.ids()), _partition), interrupted=stop.is_set()
    )
    model = keep_model(sources, out)
    return replace(
        result,
        seconds=seconds,
        num_workers=runners.num_workers,
        peak_rss_mb=result.peak_rss_mb + runners.workers_peak_rss_mb,
        state=context.state,
        model=model,
        interrupted=stop.is_set(),
    )


def _workers_for(app: FlowerApp, workers: int | None) -> int | None:
    """Return the number of processes; a worker imports the app from its folder, so one made in memory has none."""
    if is_flower_app(app.folder):
        return workers
    if workers:
        raise ConfigError(
            f"Flower app {app.name!r} was made in memory, with no folder from which {workers} worker processes could "
            "import it; run it with workers=0, or write it as an app with a pyproject.toml"
        )
    return 0


@contextmanager
def serving(run_id: int) -> Iterator[list[ResultSource]]:
    """A context in which one ServerApp runs in this process; collects the results of its strategies."""
    from edgefl.flower.apps.app_log import app_log
    from edgefl.flower.internals import collecting_results, task_identity

    if not _RUNNING.acquire(blocking=False):
        raise ConfigError("a Flower app is already running in this process; start another process for the next")
    try:
        with task_identity(run_id), app_log(), collecting_results() as sources:
            yield sources
    finally:
        _RUNNING.release()


def result_of(
    app: FlowerApp, tracker: RoundTracker, sources: Sequence[ResultSource], counts: Counts, *, interrupted: bool
) -> FlowerRunResult:
    """Return a run's result, from its messages and strategies; raises QuorumNotMet if no message was answered."""
    from edgefl.flower.apps.error_boundary import BestEffort
    from edgefl.flower.outcome import arrays_of, metrics_of

    if not interrupted or tracker.failures():
        refuse_silence(app, tracker)
    reported: dict[int, dict[str, float]] = {}
    with BestEffort("the results of the app's strategies"):
        reported = metrics_of(sources)
    rounds = tuple(seen.report(reported.get(seen.number)) for seen in tracker.rounds)
    last = reported[max(reported)] if reported else {}
    return FlowerRunResult(
        app=app.name,
        rounds=rounds,
        final={**(rounds[-1].metrics if rounds else {}), **last},
        seconds=0.0,
        num_clients=sum(seen.num_admitted for seen in tracker.rounds),
        num_workers=0,
        peak_rss_mb=peak_rss_mb(),
        arrays=arrays_of(sources),
        took_part=counts,
    )


def took_part(tracker: RoundTracker, num_nodes: int, position: Callable[[str], int]) -> Counts:
    """Count the rounds of each node, by its position."""
    counts = no_counts(num_nodes)
    for seen in tracker.rounds:
        count_clients(counts, (position(node) for node in seen.participants))
    return counts


def _partition(node: str) -> int:
    return int(node.rpartition("-")[2])


def keep_model(sources: Sequence[ResultSource], out: Path | None) -> Json | None:
    """Write the model to a file, if there is a model and a path."""
    from edgefl.flower.outcome import arrays_of, write_arrays

    arrays = arrays_of(sources) if out is not None else None
    return None if out is None or arrays is None else write_arrays(arrays, out)


def refuse_silence(app: FlowerApp, tracker: RoundTracker) -> None:
    """Raise QuorumNotMet if no client did what was asked; Flower would report success."""
    silent = tracker.unanswered()
    if silent is None:
        return
    if tracker.failures():
        raise QuorumNotMet(f"{KIND} {app.name!r}: every client failed, in every round. {_quoted(tracker.failures())}")
    raise QuorumNotMet(
        f"{KIND} {app.name!r}: none of its {tracker.num_asked(silent)} {silent} messages was answered in time; "
        "expected at least one answer. Check the app's timeout, and what its clients do"
    )


def raise_with_reasons(app: FlowerApp, tracker: RoundTracker, error: TaskError) -> NoReturn:
    """Raise the ServerApp's error, with the earlier failures of its clients, which often caused it."""
    try:
        refuse_silence(app, tracker)
    except QuorumNotMet as first:
        raise QuorumNotMet(f"{first}. After that: {error}") from error
    if reasons := tracker.all_failures():
        raise TaskError(f"{error}. Clients had failed before: {_quoted(reasons)}") from error
    raise error


def _quoted(reasons: Sequence[str]) -> str:
    more = f"; and {len(reasons) - MAX_REASONS} more" if len(reasons) > MAX_REASONS else ""
    return f"{'; '.join(reasons[:MAX_REASONS])}{more}"
