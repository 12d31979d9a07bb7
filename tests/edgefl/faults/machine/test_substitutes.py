"""The substitutes are in the programs' namespaces within the block, and nowhere after it."""

from __future__ import annotations

import secrets
import threading
import time

import cloud.aggregator
import cloud.dataplane.open_round
import cloud.state.storage
import edge_agent.agent
import edge_agent.training.trainer
import edgefl.rounds
from edgefl.faults.machine import substitutes, threads
from edgefl.faults.machine.kernel import Kernel
from edgefl.faults.machine.network import Network


class Seen:
    def trainer(self, *_):
        return "trainer"

    def outcome(self, outcome):
        raise AssertionError(outcome)


def test_the_programs_see_the_simulation_and_then_the_real_things_again():
    storage, clock = cloud.state.storage, edgefl.rounds.Job.__init__.__kwdefaults__["clock"]
    with substitutes.installed(Seen()):
        assert isinstance(storage.threading, threads.SimThreading)
        assert cloud.aggregator.ThreadPoolExecutor is threads.SimExecutor
        assert edge_agent.agent.Trainer() == "trainer"
        assert edgefl.rounds.Job.__init__.__kwdefaults__["clock"] is not clock
        network = Network(Kernel(1))
        with substitutes.entered(network):
            network.kernel.now_s = 5.0
            assert storage.Storage(None)._clock() == 5.0
            assert storage.time.time() == substitutes.EPOCH_S + 5.0
            first = cloud.state.jobs.secrets.token_hex(4)
        with substitutes.entered(Network(Kernel(1))):
            assert cloud.state.jobs.secrets.token_hex(4) == first
    assert storage.threading is threading
    assert storage.time is time
    assert cloud.state.jobs.secrets is secrets
    assert edgefl.rounds.Job.__init__.__kwdefaults__["clock"] is clock is time.monotonic
    assert edge_agent.agent.Trainer is edge_agent.training.trainer.Trainer
