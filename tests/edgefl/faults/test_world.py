"""One world: the real programs run a job on virtual time, and what they did is written down."""

from __future__ import annotations

import pytest

from edgefl.faults.plan import Fault, draw
from edgefl.faults.run import Simulator

FLAT = ["flat"]


@pytest.fixture(scope="module")
def simulator():
    with Simulator(FLAT) as made:
        yield made


def calm():
    return draw(0, FLAT).without(())


def test_a_fleet_without_faults_trains_each_round_once(simulator):
    verdict = simulator.run(calm())
    assert verdict.wrong == ()
    assert verdict.num_trained <= verdict.settings.rounds * len(verdict.settings.fleet.devices)
    assert verdict.virtual_s > 40


def test_a_cloud_that_is_killed_goes_on_from_its_home(simulator):
    verdict = simulator.run(calm().without([Fault(at_s=1.0, kind="kill", node="cloud", for_s=2.0)]))
    assert verdict.wrong == ()
    assert sum(line.endswith("start cloud") for line in verdict.trace) == 2


def test_a_kill_at_a_commit_happens_at_that_commit(simulator):
    fault = Fault(at_s=0.0, kind="kill-before-commit", node="cloud", for_s=1.0, number=1)
    late = Fault(at_s=0.6, kind="kill-after-commit", node="cloud", for_s=1.0, number=2)
    verdict = simulator.run(calm().without([fault, late]))
    assert verdict.wrong == ()
    assert sum(line.endswith("killed cloud") for line in verdict.trace) >= 1


def test_a_full_disk_pauses_the_cloud(simulator):
    verdict = simulator.run(calm().without([Fault(at_s=0.8, kind="full", node="cloud", for_s=6.0)]))
    assert verdict.wrong == ()
    assert any("storage.refused" in line for line in verdict.trace)


def test_a_fault_after_the_end_does_not_happen(simulator):
    verdict = simulator.run(calm().without([Fault(at_s=500.0, kind="kill", node="cloud", for_s=1.0)]))
    assert not verdict.faults
