"""One actor on a cluster of our own: started, replaced, ended."""

import dataclasses
import os
from contextlib import closing

import pytest

from edgefl.errors import ConfigError
from edgefl.simulation.engines.pool.messages import Begin, Chunk, Done, Gone, Ready
from edgefl.simulation.engines.ray.actor import Actor, start_of
from edgefl.simulation.engines.ray.cluster import Cluster
from edgefl.simulation.engines.ray.worker import RayWorker, wait_for_any


class Mortal(Actor):
    """An actor that has its weaknesses."""

    def answer(self, message):
        if message == "die":
            os._exit(1)
        return super().answer(message)


def heard(worker):
    assert wait_for_any([worker], 60.0) == [worker]
    return worker.hear()


def test_an_actor_answers_is_lost_and_is_replaced(set_up, plan_of):
    setup = set_up()
    plan = plan_of(setup)
    begin = Begin(dataclasses.replace(plan, parameters={}), sums=False)
    with closing(Cluster()) as cluster:
        remote = cluster.ray.remote(num_cpus=1, max_restarts=0)(Mortal)
        start, parameters = start_of(setup, here=True), cluster.ray.put(dict(plan.parameters))
        worker = RayWorker(lambda: remote.remote(start), lambda: (parameters, dict(plan.frozen)))
        assert not worker.ready
        assert heard(worker) == Ready()
        worker.begin(begin)
        worker.ask(Chunk(plan.clients[:1]))
        worker.begin(begin)  # what that round owed is for nobody
        worker.ask(Chunk(plan.clients[1:2]))
        answer = heard(worker)
        assert isinstance(answer, Done)
        assert [one.device for one in answer.answers] == ["client-1"]
        worker.ask("nonsense")
        assert heard(worker) == Gone("raised TypeError: a worker cannot answer a str")
        worker.ask("die")
        assert heard(worker) == Gone("was lost (ActorDiedError)")
        start = dataclasses.replace(start, reference="no.such:task")
        worker.restart()
        assert not worker.ready
        with pytest.raises(ConfigError, match=r"on the Ray cluster cannot start: .*no module 'no'"):
            heard(worker)
        worker.end()
