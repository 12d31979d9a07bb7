"""One actor of a cluster, from the simulation's side: started, spoken to, replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from edgefl.errors import ConfigError
from edgefl.simulation.engines.pool.messages import Begin, Chunk, Done, Flush, Gone, Ready, Summed
from edgefl.simulation.engines.ray.cluster import import_ray

FETCH_S = 60.0  # to bring here what is there


class RayWorker:
    """An actor, and what it owes. It takes its place when the cluster has one; nobody waits for it."""

    def __init__(self, launch: Callable[[], Any], parameters: Callable[[], Any]) -> None:
        self._ray = import_ray()
        self._launch, self._parameters = launch, parameters  # both give what only Ray knows: handles, references
        self.peak_rss_mb = 0.0
        self.ready = False
        self._actor: Any = None
        self._begun: list[Any] = []  # references: of the last `begin`, until it is known to have gone well
        self._run()

    def begin(self, begin: Begin) -> None:
        """Tell it of a round. What it owes of one that was ended early, it does first, for nobody."""
        self._begun = [self._actor.begin.remote(begin, *self._parameters())]

    def ask(self, message: Chunk | Flush) -> None:
        self.owed = self._actor.answer.remote(message)

    def hear(self) -> Ready | Done | Summed | Gone:
        """Return its answer; raises ConfigError where it cannot load its task."""
        try:
            *_, answer = self._ray.get([*self._begun, self.owed], timeout=FETCH_S)
        except self._ray.exceptions.RayTaskError as error:
            return Gone(f"raised {type(error.cause).__name__}: {error.cause}")
        except self._ray.exceptions.RayError as error:
            return Gone(f"was lost ({type(error).__name__})")
        self._begun = []
        if isinstance(answer, Ready):
            if answer.fault:
                raise ConfigError(f"a worker on the Ray cluster cannot start: {answer.fault}")
            self.ready = True
        if isinstance(answer, Summed):
            self.peak_rss_mb = max(self.peak_rss_mb, answer.peak_rss_mb)
        heard: Ready | Done | Summed = answer
        return heard

    def restart(self) -> None:
        """End it, and have another started wherever there is room."""
        self.end()
        self._run()

    def leave(self) -> Any:
        """Ask it to tidy up; return the reference of its answer."""
        return self._actor.leave.remote()

    def end(self) -> None:
        self._ray.kill(self._actor)

    def _run(self) -> None:
        self.ready, self._begun = False, []
        self._actor = self._launch()
        self.owed = self._actor.ready.remote()


def wait_for_any(workers: Sequence[RayWorker], within_s: float) -> Sequence[RayWorker]:
    """Return a worker that has answered; none after so many seconds."""
    by_owed = {worker.owed: worker for worker in workers}
    answered, _ = import_ray().wait(list(by_owed), num_returns=1, timeout=within_s)
    return [by_owed[reference] for reference in answered]
