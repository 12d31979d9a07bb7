"""A fleet over a bad network whose processes are killed: the model is that of an undisturbed run, nothing is left over.

A cloud, its mosquitto, two regions, six devices and an operator, each on a machine of its own (a network namespace),
with cables that delay, lose and are cut. Every round of every job must count each device exactly once.
"""

from __future__ import annotations

import pytest

from benchmarks.network.machines import why_not
from cloud.broker.child import find_mosquitto
from tests.e2e.network.audit import faults_of
from tests.e2e.network.events import CALM_LOSS, MOST_AT_ONCE, SHARES, Storm, draw
from tests.e2e.network.fleet import NAMES, NetworkFleet

HANGS_S = 100.0  # without another fault, the next round must end by then


def weather(folder, num_events, rounds, seed):
    """Do events to a fleet, and run jobs one after the other meanwhile; return the storm and the number of rounds."""
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed; deploy/system-packages.sh installs it")
    if reason := why_not():
        pytest.skip(reason)
    with NetworkFleet(folder, seed, fit_s=0.05) as fleet:
        fleet.start()
        for name in NAMES:
            fleet.machines.set_link(name, loss=CALM_LOSS)
        storm, run, jobs = Storm(fleet), fleet.start_run(rounds), 1
        for burst in draw(num_events, seed):
            if run.popen.poll() is not None:
                audit(fleet, rounds)
                run, jobs = fleet.start_run(rounds), jobs + 1
            for event in burst:
                storm.do(event)
            assert recovers(fleet, storm), f"no round in {HANGS_S:g} s after {storm.done[-MOST_AT_ONCE:]}"
            assert fleet.orphans() == []
            assert fleet.ended_by_itself() == {}
        while run.popen.poll() is None:
            assert recovers(fleet, storm), f"no round in {HANGS_S:g} s after all events"
        audit(fleet, rounds)
        assert fleet.ended_by_itself() == {}
        assert fleet.end_all() == {}
    return storm, jobs * rounds


def recovers(fleet, storm):
    """Wait until a round, or the job, ends after the last event; False if none does."""
    done, run = fleet.rounds_done(), fleet.running["run"]
    return storm.wait_for(lambda: fleet.rounds_done() > done or run.popen.poll() is not None, HANGS_S)


def audit(fleet, rounds):
    """Check a job that has ended: its exit status, its rounds, and its model."""
    run = fleet.running.pop("run")
    assert run.stop() == 0, run.log.read_text()[-3000:]
    assert faults_of(fleet.result, fleet.model, rounds) == []


def test_ten_faults_change_nothing(tmp_path):
    storm, rounds = weather(tmp_path, num_events=10, rounds=12, seed=1)
    assert {event.kind for event in storm.done} == set(SHARES)
    assert rounds >= 12


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_thousand_faults_change_nothing(tmp_path):
    storm, rounds = weather(tmp_path, num_events=1000, rounds=100, seed=2)
    assert len(storm.done) == 1000
    assert storm.missed < 100
    assert rounds >= 300
