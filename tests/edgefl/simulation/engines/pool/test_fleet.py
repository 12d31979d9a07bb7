"""The pool gives what the loop gives, whoever dies."""

import dataclasses
import os
import signal
from contextlib import closing

import numpy as np
import pytest

from edgefl.errors import ConfigError, QuorumNotMet
from edgefl.records import Partial
from edgefl.simulation.engines.loop import LoopFleet
from edgefl.simulation.engines.pool.fleet import PoolFleet
from edgefl.testing import ManualClock


def same(one, other):
    assert sorted(one.admitted) == sorted(other.admitted)
    assert (one.failed, one.rejected, one.weight) == (other.failed, other.rejected, other.weight)
    assert one.metrics == pytest.approx(other.metrics, abs=1e-12)
    assert (one.up_bytes, one.down_bytes) == (other.up_bytes, other.down_bytes)
    for name, array in one.parameters.items():
        np.testing.assert_allclose(array, other.parameters[name], rtol=0, atol=1e-12)


def test_rounds_agree_with_the_loop_and_a_killed_worker_changes_nothing(set_up, run):
    setup = set_up("dropout", clients=40, data={"empty": "2", "infinite": "3"}, rounds={"count": 3})
    with closing(PoolFleet(setup, 2)) as pool:
        collect = pool.collect

        def kill_in_round_two(plan):
            if plan.round == 2:
                os.kill(pool.pool.workers[0].pid, signal.SIGKILL)
            yield from collect(plan)

        pool.collect = kill_in_round_two
        for one, other in zip(run(setup, pool), run(setup, LoopFleet(setup)), strict=True):
            same(one, other)
        assert pool.peak_rss_mb > 0


def test_single_updates_come_in_the_plans_order_and_a_round_ended_early_leaves_nothing(set_up, run, plan_of):
    setup = set_up(clients=12, rounds={"count": 3, "clients": 6, "over_selection": 0.5})
    with closing(PoolFleet(setup, 2)) as pool:
        for one, other in zip(run(setup, pool), run(setup, LoopFleet(setup)), strict=True):
            assert one.admitted == other.admitted
            same(one, other)
        setup.stop.set()
        assert list(pool.collect(plan_of(setup))) == []


@pytest.mark.parametrize(("deaths", "failed"), [(1, []), (2, ["client-05"])])
def test_a_client_that_ends_its_worker_is_tried_once_more(set_up, run, tmp_path, deaths, failed):
    data = {"deadly": f"5@{tmp_path}", "deaths": str(deaths)}
    setup = set_up(clients=64, data=data, rounds={"count": 1})
    with closing(PoolFleet(setup, 1)) as pool:
        (outcome,) = run(setup, pool)
    assert list(outcome.failed) == failed
    assert len(outcome.admitted) == 64 - len(failed)
    assert all("was ended by SIGKILL" in reason for reason in outcome.failed.values())


def test_a_worker_sends_one_sum(set_up, plan_of):
    setup = set_up()
    with closing(PoolFleet(setup, 1)) as pool:
        (answer,) = pool.collect(plan_of(setup))
    assert isinstance(answer, Partial)
    assert answer.contributors == tuple(setup.population.names())


def test_a_round_that_all_fail_is_loud(set_up, run, tmp_path):
    setup = set_up(clients=1, data={"deadly": f"0@{tmp_path}", "deaths": "9"}, rounds={"count": 1})
    with closing(PoolFleet(setup, 1)) as pool, pytest.raises(QuorumNotMet, match="SIGKILL"):
        run(setup, pool)


def test_a_silent_worker_is_replaced_at_the_deadline(set_up, run):
    setup = set_up(clients=2, rounds={"count": 1, "deadline_s": 100.0})
    clock = ManualClock()
    with closing(PoolFleet(setup, 1)) as fleet:
        wait, waited_s = fleet.pool.wait, []

        def passed(workers, within_s):
            waited_s.append(within_s)
            if len(waited_s) > 1:
                return wait(workers, within_s)
            clock.advance(within_s)  # nobody answers meanwhile
            return []

        fleet.pool.wait, fleet.pool.clock = passed, clock
        before = fleet.pool.workers[0].pid
        os.kill(before, signal.SIGSTOP)
        (outcome,) = run(setup, fleet)
        assert fleet.pool.workers[0].pid != before
    assert waited_s[0] == 100.0
    assert len(outcome.admitted) == 2


def test_the_trial_of_stacks_is_a_workers_and_one_that_it_ends_is_replaced(set_up, plan_of, tmp_path):
    with closing(PoolFleet(set_up(), 1)) as fleet:
        assert fleet.why_not_stacked() is None
    setup = set_up(data={"deadly": f"1@{tmp_path}", "deaths": "1"})
    with closing(PoolFleet(setup, 1)) as fleet:
        (before,) = (worker.pid for worker in fleet.pool.workers)
        assert fleet.why_not_stacked() == "the worker that tested it was ended by SIGKILL"
        assert fleet.why_not_stacked() is None
        assert fleet.pool.workers[0].pid != before


def test_one_that_cannot_load_its_task_says_why(set_up):
    with pytest.raises(ConfigError, match=r"a worker process cannot start: .*no module 'no'"):
        PoolFleet(dataclasses.replace(set_up(), reference="no.such:task"), 1)


def test_a_task_without_a_name_is_refused(set_up):
    with pytest.raises(ConfigError, match="cannot be sent"):
        PoolFleet(dataclasses.replace(set_up("dropout"), reference=None), 1)
