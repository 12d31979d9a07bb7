"""One actor on a cluster of our own: started, asked, ended."""

import dataclasses
import os
from contextlib import closing

import pytest

from edgefl.errors import ConfigError
from edgefl.process.workers.messages import Ready, WorkerLost
from edgefl.simulation.engines.pool.messages import BeginRound, Chunk, Done
from edgefl.simulation.engines.ray.actor import Actor, start_of
from edgefl.simulation.engines.ray.cluster import Cluster
from edgefl.simulation.engines.ray.worker import RayWorker, wait_for_actors


class Mortal(Actor):
    """An actor that has its weaknesses."""

    def answer(self, message):
        if message == "die":
            os._exit(1)
        return super().answer(message)


def heard(worker):
    assert wait_for_actors([worker], 60.0) == [worker]
    return worker.receive()


@pytest.mark.soak
def test_an_actor_answers_and_says_how_it_is_lost(set_up, plan_of):
    setup = set_up()
    plan = plan_of(setup)
    begin = BeginRound(dataclasses.replace(plan, parameters={}), sums=False)
    with closing(Cluster()) as cluster:
        remote = cluster.ray.remote(num_cpus=1, max_restarts=0)(Mortal)
        start, parameters = start_of(setup, here=True), cluster.ray.put(dict(plan.parameters))
        worker = RayWorker(lambda: remote.remote(start), lambda: (parameters, dict(plan.frozen)))
        assert heard(worker) == Ready()
        for clients in (plan.clients[:1], plan.clients[1:2]):
            worker.ask(begin)
            worker.ask(Chunk(clients))
        for name in ("client-0", "client-1"):
            reply = heard(worker)
            assert isinstance(reply.answer, Done)
            assert [one.device for one in reply.answer.answers] == [name]
            assert reply.peak_rss_mb > 1
        worker.ask("nonsense")
        with pytest.raises(WorkerLost, match="raised TypeError: a worker cannot answer a str"):
            heard(worker)
        worker.ask("die")
        with pytest.raises(WorkerLost, match=r"was lost \(ActorDiedError\)"):
            heard(worker)
        worker.end()
        start = dataclasses.replace(start, reference="no.such:task")
        worker = RayWorker(lambda: remote.remote(start), lambda: (parameters, dict(plan.frozen)))
        with pytest.raises(ConfigError, match=r"on the Ray cluster cannot start: .*no module 'no'"):
            heard(worker)
        worker.end()
