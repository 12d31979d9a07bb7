"""A real cluster of two nodes, as `ray start` makes them: the loop's results, and whoever is killed changes nothing."""

import dataclasses
import os
import shutil
import signal
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from edgefl.errors import ConfigError
from edgefl.local_fleet import LoggedProcess, free_ports
from edgefl.records import Update
from edgefl.simulation.engines.loop import LoopFleet
from edgefl.simulation.engines.ray.fleet import RayFleet

RAY = (sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--disable-usage-stats")
STARTED = "--block"  # it is said when all runs


class Nodes:
    """A head and another node, of one CPU each, on this machine."""

    def __init__(self, folder):
        self.folder = folder
        self.address = f"127.0.0.1:{free_ports(1)[0]}"
        port = self.address.partition(":")[2]
        self.head = self._start("head", "--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}")
        self.restore()

    def restore(self):
        self.second = self._start("second", f"--address={self.address}")

    def kill(self):
        self.second.kill()

    def _start(self, name, *options):
        ports = ("--min-worker-port=0", "--max-worker-port=0")  # any: a range has to be without the head's port
        process = LoggedProcess([*RAY, *options, *ports], Path(self.folder) / f"{name}.log")
        process.wait_for(STARTED)
        return process

    def close(self):
        for process in (self.second, self.head):
            process.stop()


@pytest.fixture(scope="module")
def cluster():
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets lie below it: its name has to be short
    with closing(Nodes(folder)) as nodes:
        yield nodes
    shutil.rmtree(folder)


@pytest.fixture
def nodes(cluster):
    if cluster.second.popen.poll() is not None:
        cluster.restore()
    return cluster


def same(one, other):
    assert sorted(one.admitted) == sorted(other.admitted)
    assert (one.failed, one.rejected, one.weight) == (other.failed, other.rejected, other.weight)
    assert one.metrics == pytest.approx(other.metrics, abs=1e-12)
    assert (one.up_bytes, one.down_bytes) == (other.up_bytes, other.down_bytes)
    for name, array in one.parameters.items():
        np.testing.assert_allclose(array, other.parameters[name], rtol=0, atol=1e-12)


def pid_of(fleet, worker):
    return fleet.cluster.ray.get(worker.actor.__ray_call__.remote(lambda _actor: os.getpid()))


@pytest.mark.soak
@pytest.mark.parametrize("killed", ["node", "actor"])
def test_rounds_agree_with_the_loop_whoever_is_killed(nodes, set_up, run, killed):
    data = {"empty": "2", "infinite": "3"}
    setup = set_up("dropout", clients=40, data=data, rounds={"count": 2, "deadline_s": 60.0})
    with closing(RayFleet(setup, nodes.address)) as fleet:
        assert fleet.pool.size >= 2  # a node that was killed just now may still be counted
        collect, pid = fleet.collect, pid_of(fleet, fleet.pool.ready_workers[0])

        def kill(plan):
            if plan.round == 2 and killed == "node":
                nodes.kill()
            if plan.round == 2 and killed == "actor":
                os.kill(pid, signal.SIGKILL)
            return collect(plan)

        fleet.collect = kill
        for one, other in zip(run(setup, fleet), run(setup, LoopFleet(setup)), strict=True):
            same(one, other)
        assert fleet.peak_rss_mb > 0


@pytest.mark.soak
def test_single_updates_come_in_the_plans_order_and_a_round_ended_early_leaves_nothing(nodes, set_up, run, plan_of):
    setup = set_up(clients=12, rounds={"count": 3, "clients": 6, "over_selection": 0.5})
    with closing(RayFleet(setup, nodes.address)) as fleet:
        for one, other in zip(run(setup, fleet), run(setup, LoopFleet(setup)), strict=True):
            assert one.admitted == other.admitted
            same(one, other)
        setup.stop.set()
        assert list(fleet.collect(plan_of(setup))) == []


@pytest.mark.soak
def test_a_task_that_cannot_be_loaded_there_is_refused(nodes, set_up):
    setup = dataclasses.replace(set_up(), make_population=unloadable)
    with pytest.raises(ConfigError, match="cannot start: population 'x' is not here"):
        RayFleet(setup, nodes.address)


def unloadable(_task):
    raise ConfigError("population 'x' is not here")


@pytest.mark.soak
def test_a_deadly_client_fails_alone(nodes, set_up, plan_of, tmp_path):
    setup = set_up(clients=12, data={"deadly": f"5@{tmp_path}", "deaths": "9"}, rounds={"count": 1, "clients": 6})
    with closing(RayFleet(setup, nodes.address)) as fleet:
        answers = list(fleet.collect(plan_of(setup)))
    failed = {one.device: one.reason for one in answers if not isinstance(one, Update)}
    assert failed == {"client-05": "its worker was lost (ActorDiedError)"}
