"""One actor of a cluster, on the simulation's side."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from edgefl.errors import ConfigError
from edgefl.process.workers.messages import Ready, Reply, WorkerLost
from edgefl.simulation.engines.pool.messages import BeginRound, Chunk, Flush
from edgefl.simulation.engines.ray.cluster import import_ray

FETCH_S = 60.0  # for transferring an available result


class RayWorker:
    """An actor that starts when the cluster has a free CPU; the simulation does not wait for it."""

    def __init__(self, launch: Callable[[], Any], parameters: Callable[[], Any]) -> None:
        self._ray = import_ray()
        self._parameters = parameters  # returns Ray references, as `launch` returns a Ray handle
        self.actor = launch()
        self._begun: list[Any] = []  # references of the last `begin`, until it has succeeded
        self._owed = deque([self.actor.ready.remote()])  # references to its answers, in order

    @property
    def owed(self) -> Any:
        """Return the reference of its next answer."""
        return self._owed[0]

    def ask(self, message: BeginRound | Chunk | Flush) -> None:
        if isinstance(message, BeginRound):
            self._begun = [self.actor.begin.remote(message, *self._parameters())]
        else:
            self._owed.append(self.actor.answer.remote(message))

    def receive(self) -> Ready | Reply:
        """Return its next answer; raises WorkerLost, and ConfigError if it cannot load its task."""
        try:
            *_, said = self._ray.get([*self._begun, self._owed.popleft()], timeout=FETCH_S)
        except self._ray.exceptions.RayTaskError as error:
            raise WorkerLost(f"raised {type(error.cause).__name__}: {error.cause}") from error
        except self._ray.exceptions.RayError as error:
            raise WorkerLost(f"was lost ({type(error).__name__})") from error
        self._begun = []
        heard: Ready | Reply = said
        if isinstance(heard, Ready) and heard.fault:
            raise ConfigError(f"a worker on the Ray cluster cannot start: {heard.fault}")
        return heard

    def leave(self) -> Any:
        """Ask it to remove its unpacked files; return the reference of its answer."""
        return self.actor.leave.remote()

    def end(self, *, kindly: bool = False) -> None:  # noqa: ARG002 - an actor is ended in one way
        self._ray.kill(self.actor)


def wait_for_actors(workers: Sequence[RayWorker], within_s: float) -> Sequence[RayWorker]:
    """Return a worker that has answered; none after `within_s` seconds."""
    by_owed = {worker.owed: worker for worker in workers}
    answered, _ = import_ray().wait(list(by_owed), num_returns=1, timeout=within_s)
    return [by_owed[reference] for reference in answered]
