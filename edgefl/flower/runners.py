"""Where a run's ClientApps are executed: in this process, in worker processes, or first here and then in workers.

Starting workers takes seconds, and the length of a run is not known in advance. So a run starts in this process.
If it lasts longer, it starts workers, continues here in the meantime, and moves to them once they are ready.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from edgefl.errors import ConfigError
from edgefl.flower.apps.app import FlowerApp
from edgefl.flower.nodes import Delivery, InProcess, NodeReply
from edgefl.flower.workers import Workers
from edgefl.measure import num_cores

START_S = 0.5  # of work in this process before workers are started, as they take seconds to import torch


class Runners:
    """The runner of one run. `workers`: 0 = only this process, None = decide during the run. A context manager."""

    def __init__(self, app: FlowerApp, workers: int | None, clock: Callable[[], float]) -> None:
        if workers is not None and workers < 0:
            raise ConfigError(f"workers={workers} must be 0 (only this process) or more")
        self._app, self._clock = app, clock
        self._number = num_cores() if workers is None else workers
        self._here = InProcess(app.name, app.client_app, clock, app.clients_randomness)
        self._left_s = math.inf if workers == 0 or self._number == 1 else START_S  # work left to do in this process
        if workers:
            self._left_s = 0.0
        self._asked_for, self._all_there = bool(workers), False
        self._workers: Workers | None = None
        self._stack = ExitStack()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, raised, trace)

    @property
    def workers_peak_rss_mb(self) -> float:
        """The sum of the workers' peak memory."""
        return 0.0 if self._workers is None else self._workers.peak_rss_mb

    @property
    def num_workers(self) -> int:
        """Number of worker processes; 0 if all work was done in this process."""
        return 0 if self._workers is None else self._number

    def run(self, deliveries: Iterable[Delivery], within_s: float) -> Iterator[NodeReply]:
        """Yield answers as they come, of clients that need at most `within_s`."""
        source = iter(deliveries)
        while not self._at_workers():
            delivery = next(source, None)
            if delivery is None:
                return
            start_s = self._clock()
            answers = list(self._here.run([delivery], within_s))
            self._left_s -= self._clock() - start_s
            yield from answers
        yield from self._in_workers().run(source, within_s)

    def _at_workers(self) -> bool:
        """Whether workers do the rest; starts them after enough work in this process."""
        if self._left_s > 0:
            return False
        if self._all_there or self._asked_for:
            return True
        if self._workers is None:
            self._in_workers().start()
        self._all_there = self._in_workers().ready
        return self._all_there

    def _in_workers(self) -> Workers:
        with self._lock:
            if self._workers is None:
                self._workers = self._stack.enter_context(Workers(self._app, self._number, self._clock))
            return self._workers
