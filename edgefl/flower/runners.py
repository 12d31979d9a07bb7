"""Where a run's ClientApps are executed: in this process, in worker processes, or first here, then there.

Starting workers takes seconds, and nobody knows how long a run will be. So it starts here; a run that is
not over soon has workers started, goes on here meanwhile, and moves once they are ready.
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
from edgefl.flower.nodes import Answer, Delivery, InProcess
from edgefl.flower.workers import Workers
from edgefl.measure import num_cores

START_S = 0.5  # of work in this process, before workers that import torch for seconds are worth their start


class Runners:
    """The runner of one run. `workers`: 0 = this process alone, None = decide on the way. Use it as a context."""

    def __init__(self, app: FlowerApp, workers: int | None, clock: Callable[[], float]) -> None:
        if workers is not None and workers < 0:
            raise ConfigError(f"workers={workers} must be 0 (this process alone) or more")
        self._app, self._clock = app, clock
        self._number = num_cores() if workers is None else workers
        self._here = InProcess(app.name, app.client_app, clock)
        self._left_s = math.inf if workers == 0 or self._number == 1 else START_S  # to spend in this process
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
        """The most memory that the workers have held, added up."""
        return 0.0 if self._workers is None else self._workers.peak_rss_mb

    @property
    def num_workers(self) -> int:
        """How many worker processes there are; 0 where all was done here."""
        return 0 if self._workers is None else self._number

    def run(self, deliveries: Iterable[Delivery], within_s: float) -> Iterator[Answer]:
        """Yield answers as they come, of the clients that need no longer than this."""
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
        """Say whether workers do the rest; starts them once enough was done here."""
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
