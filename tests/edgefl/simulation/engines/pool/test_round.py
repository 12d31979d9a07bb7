"""A round on workers that live and die by a script: every client is counted once."""

import dataclasses

import numpy as np
import pytest

from edgefl.errors import ConfigError
from edgefl.process.workers.messages import Ready, Reply, WorkerLost
from edgefl.process.workers.pool import WorkerPool
from edgefl.records import Failure, Partial
from edgefl.simulation.engines.loop import LoopFleet
from edgefl.simulation.engines.pool.chunks import ChunkTrainer
from edgefl.simulation.engines.pool.messages import BeginRound, Chunk
from edgefl.simulation.engines.pool.round import PoolHistory, Round

SINGLE = {"clients": 39, "over_selection": 0.02}  # one more is asked than wanted: then there are no sums


class Scripted:
    """A worker in this process. `fate`: for each thing it says, whether it dies instead; its start is the first."""

    def __init__(self, setup, plan, fate):
        self.trainer = ChunkTrainer(setup.task, setup.population, setup.config)
        self.parameters, self.fate, self.says, self.asked = plan.parameters, fate, [Ready()], []

    def ask(self, message):
        if isinstance(message, BeginRound):
            self.trainer.begin(dataclasses.replace(message.plan, parameters=self.parameters), sums=message.sums)
        else:
            self.asked.append(message)
            self.says.append(message)

    def receive(self):
        said = self.says.pop(0)
        if next(self.fate, False):
            raise WorkerLost("died by the script")
        return said if isinstance(said, Ready) else Reply(self.trainer.answer(said), 0.0)

    def end(self, *, kindly=False):
        self.says = []


class Stage:
    """A round of 40 clients on workers of such fates, on a clock that moves when nobody answers."""

    def __init__(self, setup, plan, *fates, history=None, kind=Scripted):
        self.now_s, self.workers = 0.0, []

        def launcher(fate):
            def launch():
                self.workers.append(kind(setup, plan, fate))
                return self.workers[-1]

            return launch

        launchers = [launcher(iter(fate)) for fate in fates]
        self.pool = WorkerPool(launchers, self._wait, clock=lambda: self.now_s)
        self.round = Round(setup, plan, self.pool, history or PoolHistory())

    def _wait(self, workers, within_s):
        answered = [worker for worker in workers if worker.says and not getattr(worker, "silent", False)]
        self.now_s += 0.0 if answered else within_s
        return answered

    def answers(self):
        return list(self.round.run())


@pytest.fixture
def trained(set_up, plan_of):
    """Run a round of 40 clients on workers of such fates; return its answers, the loop's, and the workers."""

    def run(*fates, **rounds):
        setup = set_up(clients=40, rounds=rounds)
        plan = plan_of(setup)
        stage = Stage(setup, plan, *fates)
        return stage.answers(), list(LoopFleet(setup).collect(plan)), stage.workers

    return run


def same_sum(answers, singles):
    assert all(isinstance(one, Partial) for one in answers)
    assert sorted(name for one in answers for name in one.contributors) == [one.device for one in singles]
    for name in singles[0].tree:
        total = sum(one.total[name] for one in answers)
        np.testing.assert_allclose(total, sum(one.weight * one.tree[name] for one in singles), atol=1e-10)


@pytest.mark.parametrize(
    "fates",
    [
        ([], []),
        ([False, True], []),  # at its first chunk
        ([False] * 10 + [True], []),  # with a sum that nobody had yet
        ([False, False, True, True], [False] * 9 + [True, True, True]),  # and while it starts
    ],
)
def test_whoever_dies_when_the_sum_is_the_same(trained, fates):
    answers, singles, _ = trained(*fates)
    same_sum(answers, singles)


def test_the_others_go_on_without_one_that_cannot_be_started(trained):
    answers, singles, _ = trained([True] * 99, [])
    same_sum(answers, singles)


def test_nobody_left_is_loud(trained):
    with pytest.raises(ConfigError, match="round 1: no worker can be started: the last one died by the script"):
        trained([True] * 99)


def test_single_answers_come_in_order_whoever_dies(trained):
    answers, singles, _ = trained([False, False, True], [False] * 10 + [True], **SINGLE)
    assert [one.device for one in answers] == [one.device for one in singles]
    for one, other in zip(answers, singles, strict=True):
        np.testing.assert_array_equal(one.tree["0.weight"], other.tree["0.weight"])


class Deadly(Scripted):
    def receive(self):
        if self.says and isinstance(self.says[0], Chunk) and "client-2" in self.says[0].clients:
            raise WorkerLost("died of client-2")
        return super().receive()


def test_a_client_that_ends_two_workers_fails_and_is_remembered(set_up, plan_of):
    setup, history = set_up(clients=4), PoolHistory()
    plan = plan_of(setup)
    answers = Stage(setup, plan, [], [], history=history, kind=Deadly).answers()
    assert [one.device for one in answers if isinstance(one, Failure)] == ["client-2"]
    assert [one.reason for one in answers if isinstance(one, Failure)] == ["its worker died of client-2"]
    named = sorted(name for one in answers if isinstance(one, Partial) for name in one.contributors)
    assert named == ["client-0", "client-1", "client-3"]
    assert history.deadly == {"client-2": "its worker died of client-2, each of 2 times"}


@pytest.mark.parametrize("rounds", [{}, {"clients": 3, "over_selection": 0.34}])
def test_and_is_failed_in_later_rounds_without_another_try(set_up, plan_of, rounds):
    setup, history = set_up(clients=4, rounds=rounds), PoolHistory({"client-1": "its worker died, each of 2 times"})
    plan = plan_of(setup)
    stage = Stage(setup, plan, [], history=history)
    answers = stage.answers()
    asked = [client for message in stage.workers[0].asked for client in getattr(message, "clients", ())]
    assert sorted(asked) == ["client-0", "client-2", "client-3"]
    assert [one.reason for one in answers if isinstance(one, Failure)] == ["its worker died, each of 2 times"]
    if rounds:
        assert [one.device for one in answers] == list(plan.clients)


def test_one_that_was_only_silent_is_tried_in_the_next_round(set_up, plan_of):
    setup, history = set_up(clients=1), PoolHistory()
    plan = plan_of(setup)

    class Silent(Scripted):
        @property
        def silent(self):
            return bool(self.asked)

    stage = Stage(setup, plan, [], history=history, kind=Silent)
    (answer,) = stage.answers()
    assert answer.reason == "its worker did not answer within 60 s"
    assert not history.deadly
    assert len(stage.workers) == 2
    assert stage.now_s == 120.0


def test_nothing_is_begun_after_a_stop(set_up, plan_of):
    setup = set_up(clients=4)
    setup.stop.set()
    stage = Stage(setup, plan_of(setup), [])
    assert stage.answers() == []
    assert stage.workers == []
