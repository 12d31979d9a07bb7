"""A round on workers that live and die by a script: every client is counted once."""

import dataclasses
import threading

import numpy as np
import pytest

from edgefl.errors import ConfigError
from edgefl.records import Failure, Partial
from edgefl.simulation.engines.loop import LoopFleet
from edgefl.simulation.engines.pool.chunks import ChunkTrainer
from edgefl.simulation.engines.pool.messages import Chunk, Gone, Ready
from edgefl.simulation.engines.pool.round import MAX_STARTS, Round


class Scripted:
    """A worker in this process. `fate`: for each thing it is asked, or started for, whether it dies of it."""

    def __init__(self, setup, plan, fate=()):
        self.setup, self.parameters, self.fate = setup, plan.parameters, iter(fate)
        self.asked, self.ready, self.silent, self.starts = None, True, False, 0
        self._start()

    def _start(self):
        self.trainer = ChunkTrainer(self.setup.task, self.setup.population, self.setup.config)

    def begin(self, begin):
        self.asked = None
        self.trainer.begin(dataclasses.replace(begin.plan, parameters=self.parameters), sums=begin.sums)

    def ask(self, message):
        self.asked = message

    def hear(self):
        message, self.asked = self.asked, None
        if next(self.fate, False):
            return Gone("died by the script")
        if isinstance(message, Ready):
            self.ready = True
            return message
        return self.trainer.answer(message)

    def restart(self):
        self.starts += 1
        self.ready, self.silent, self.asked = False, False, Ready()
        self._start()


def wait(workers, _within_s):
    return [worker for worker in workers if worker.asked is not None and not worker.silent]


@pytest.fixture
def trained(set_up, plan_of):
    """Run a round of 40 clients on workers of such fates; return its answers, the loop's, and the workers."""

    def run(*fates, sums=True, silent=()):
        setup = set_up(clients=40)
        plan = plan_of(setup)
        workers = [Scripted(setup, plan, fate) for fate in fates]
        for number in silent:
            workers[number].silent = True
        answers = list(Round(plan, workers, wait, threading.Event(), sums=sums).run())
        return answers, list(LoopFleet(setup).collect(plan)), workers

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
        ([True], []),  # at its first chunk
        ([False] * 9 + [True], []),  # with a sum that nobody had yet
        ([False, True, True], [False] * 8 + [True, True, True, False]),  # and while it starts
    ],
)
def test_whoever_dies_when_the_sum_is_the_same(trained, fates):
    answers, singles, _ = trained(*fates)
    same_sum(answers, singles)


def test_one_that_says_nothing_is_started_again(trained):
    answers, singles, workers = trained([], [], silent=[0, 1])
    same_sum(answers, singles)
    assert [worker.starts for worker in workers] == [1, 1]


def test_the_others_go_on_without_one_that_cannot_be_started(trained):
    answers, singles, workers = trained([True] * 99, [])
    same_sum(answers, singles)
    assert workers[0].starts <= 1 + MAX_STARTS


def test_nobody_left_is_loud(trained):
    with pytest.raises(ConfigError, match="no worker can be started: its worker died by the script"):
        trained([True] * 99)


def test_single_answers_come_in_order_whoever_dies(trained):
    answers, singles, _ = trained([False, True], [False] * 9 + [True], sums=False)
    assert [one.device for one in answers] == [one.device for one in singles]
    for one, other in zip(answers, singles, strict=True):
        np.testing.assert_array_equal(one.tree["0.weight"], other.tree["0.weight"])


def test_a_client_that_ends_two_workers_fails(set_up, plan_of):
    setup = set_up(clients=4)
    plan = plan_of(setup)

    class Deadly(Scripted):
        def hear(self):
            if isinstance(self.asked, Chunk) and "client-2" in self.asked.clients:
                return Gone("died of client-2")
            return super().hear()

    answers = list(Round(plan, [Deadly(setup, plan), Deadly(setup, plan)], wait, threading.Event(), sums=True).run())
    assert [one.device for one in answers if isinstance(one, Failure)] == ["client-2"]
    assert [one.reason for one in answers if isinstance(one, Failure)] == ["its worker died of client-2"]
    named = sorted(name for one in answers if isinstance(one, Partial) for name in one.contributors)
    assert named == ["client-0", "client-1", "client-3"]


@pytest.mark.parametrize("sums", [True, False])
def test_and_is_failed_in_later_rounds_without_another_try(set_up, plan_of, sums):
    setup, deadly = set_up(clients=4), {"client-1": "its worker died, each of 2 times"}
    plan, asked = plan_of(setup), []

    class Noting(Scripted):
        def ask(self, message):
            asked.extend(getattr(message, "clients", ()))
            super().ask(message)

    round_ = Round(plan, [Noting(setup, plan)], wait, threading.Event(), sums=sums, deadly=deadly)
    answers = list(round_.run())
    assert sorted(asked) == ["client-0", "client-2", "client-3"]
    assert [one.reason for one in answers if isinstance(one, Failure)] == ["its worker died, each of 2 times"]
    if not sums:
        assert [one.device for one in answers] == list(plan.clients)


def test_one_that_was_only_silent_is_tried_in_the_next_round(set_up, plan_of):
    setup, deadly = set_up(clients=1), {}
    plan = plan_of(setup)

    class Silent(Scripted):
        def ask(self, message):
            super().ask(message)
            self.silent = True

    (answer,) = Round(plan, [Silent(setup, plan)], wait, threading.Event(), sums=True, deadly=deadly).run()
    assert "no answer within" in answer.reason
    assert not deadly
