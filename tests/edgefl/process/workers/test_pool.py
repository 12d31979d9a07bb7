"""A pool by script, on a clock turned by hand: every item ends once, whichever worker is lost when."""

from __future__ import annotations

from collections import deque
from functools import partial

import pytest

from edgefl.errors import ConfigError
from edgefl.process.workers.messages import Ready, Reply, WorkerLost
from edgefl.process.workers.pool import MAX_STARTS, ItemAnswered, ItemGivenUp, NoWorkerLeft, RunTerms, WorkerPool
from edgefl.process.workers.work_queue import WorkQueue

OPEN, COLLECT = "open", "collect"


class Scripted:
    """Answers `x` with `x!`; keeps what it did for COLLECT. A fate per thing it says: None, "die", or "hang"."""

    def __init__(self, stage, fate):
        self.stage, self.fate = stage, fate
        self.said, self.asked, self.done, self.ended, self.silent = deque(), [], [], None, False
        self._say(Ready())

    def ask(self, message):
        self.asked.append(message)
        if message == OPEN:
            self.done = []
        elif message == COLLECT:
            self._say(Reply(tuple(self.done), 1.0 * len(self.stage.started)))
            self.done = []
        else:
            self.done.append(message)
            self._say(Reply(f"{message}!", 1.0 * len(self.stage.started)))

    def receive(self):
        said = self.said.popleft()
        if isinstance(said, str):
            raise WorkerLost(said)
        return said

    def end(self, *, kindly=False):
        self.ended = "kindly" if kindly else "at once"

    def _say(self, said):
        what = next(self.fate, None)
        self.silent = self.silent or what == "hang"
        self.said.append("died by the script" if what == "die" else said)


class Stage:
    """Workers by script. `fates`: of each place, over all its workers."""

    def __init__(self, *fates, kind=Scripted, **options):
        self.kind, self.now_s, self.started, self.waited_s = kind, 0.0, [], []
        launchers = [partial(self._launch, iter(fate)) for fate in fates]
        self.pool = WorkerPool(launchers, self._wait, clock=lambda: self.now_s, **options)

    def _launch(self, fate):
        self.started.append(self.kind(self, fate))
        return self.started[-1]

    def _wait(self, workers, within_s):
        answered = [worker for worker in workers if worker.said and not worker.silent]
        if not answered:
            self.waited_s.append(within_s)
            self.now_s += within_s
        return answered

    def run(self, *messages, **terms):
        return list(self.pool.run(WorkQueue(messages), RunTerms(**{"answer_s": 10.0} | terms)))


def ends(events):
    return sorted(
        (event.message, event.answer if isinstance(event, ItemAnswered) else None) for event in events
    )  # fmt: skip


def test_each_item_is_answered_and_the_workers_stay_for_the_next_run():
    stage = Stage([], [])
    assert ends(stage.run("a", "b", "c")) == [("a", "a!"), ("b", "b!"), ("c", "c!")]
    assert ends(stage.run("d")) == [("d", "d!")]
    assert len(stage.started) == 2
    stage.pool.close()
    assert [worker.ended for worker in stage.started] == ["kindly", "kindly"]


def test_a_worker_is_started_when_there_is_something_for_it():
    stage = Stage([], [])
    assert stage.run() == []
    assert stage.started == []


@pytest.mark.parametrize(
    ("fates", "started"),
    [
        ([[None, "die"], []], 3),  # at work on its first
        ([["die", None], []], 3),  # at its start
        ([[None, "die", None, None, "die"], []], 4),
    ],
)
def test_what_a_lost_worker_had_is_done_again(fates, started):
    stage = Stage(*fates)
    assert ends(stage.run(*"abcdefg")) == [(one, f"{one}!") for one in "abcdefg"]
    assert len(stage.started) == started
    assert all(worker.ended == "at once" for worker in stage.started[:1])


def test_an_item_that_costs_two_workers_is_given_up_and_the_others_are_done():
    class Deadly(Scripted):
        def receive(self):
            if self.asked[-1:] == ["x"]:
                raise WorkerLost("died of x")
            return super().receive()

    stage = Stage([], [], kind=Deadly)
    events = stage.run("x", "a", "b")
    assert [one for one in events if isinstance(one, ItemGivenUp)] == [ItemGivenUp("x", "died of x", died=True)]
    assert ends(one for one in events if isinstance(one, ItemAnswered)) == [("a", "a!"), ("b", "b!")]
    assert sum(worker.asked.count("x") for worker in stage.started) == 2


def test_one_that_hangs_is_lost_when_its_time_is_up_and_not_before():
    stage = Stage([None, "hang"], [])
    assert ends(stage.run("a", "b", "c", answer_s=7.0)) == [("a", "a!"), ("b", "b!"), ("c", "c!")]
    assert stage.waited_s == [7.0, 0.0]
    assert stage.started[0].ended == "at once"


def test_what_hangs_can_be_given_up_at_once():
    stage = Stage([None, "hang"])
    events = stage.run("a", "b", retry_late=False)
    assert events[0] == ItemGivenUp("a", "did not answer within 10 s", died=False)
    assert ends(events[1:]) == [("b", "b!")]


def test_a_start_has_its_own_time_and_counts_for_nobody():
    stage = Stage(["hang"], start_s=60.0)
    (event,) = stage.run("a", answer_s=1.0)
    assert event == NoWorkerLeft("did not answer within 60 s", died=False)


def test_the_others_go_on_without_one_that_cannot_be_started_and_the_next_run_tries_it_again():
    stage = Stage(["die"] * MAX_STARTS, [])
    assert len(ends(stage.run(*"abcdefgh"))) == 8
    assert len(stage.started) == MAX_STARTS + 1
    stage.run("a", "b")
    assert len(stage.started) == MAX_STARTS + 2


def test_no_worker_left_is_said_and_leaves_the_rest_in_the_queue():
    stage, work = Stage(["die"] * 99), WorkQueue("abc")
    assert list(stage.pool.run(work, RunTerms(answer_s=1.0))) == [NoWorkerLeft("died by the script", died=True)]
    assert list(work.rest()) == ["a", "b", "c"]


def test_results_that_workers_keep_are_collected_once_in_the_end():
    stage = Stage([], [])
    events = stage.run(*"abcde", opening=OPEN, collect=COLLECT)
    kept = [event.answer for event in events if event.message is None]
    assert sorted(one for some in kept for one in some) == list("abcde")
    assert all(worker.asked[0] == OPEN and worker.asked[-1] == COLLECT for worker in stage.started)


@pytest.mark.parametrize("dies_at", range(1, 8))
def test_kept_results_are_lost_with_their_worker_and_made_again(dies_at):
    stage = Stage([None] * dies_at + ["die"], [])
    events = stage.run(*"abcdefgh", opening=OPEN, collect=COLLECT)
    kept = [event.answer for event in events if isinstance(event, ItemAnswered) and event.message is None]
    assert sorted(one for some in kept for one in some) == list("abcdefgh")


def test_a_worker_that_dies_over_collecting_counts_for_all_that_it_kept():
    stage = Stage([None, None, "die", None, None, "die"])
    (given_up,) = [one for one in stage.run("a", opening=OPEN, collect=COLLECT) if isinstance(one, ItemGivenUp)]
    assert given_up == ItemGivenUp("a", "died by the script", died=True)


def test_one_ahead_where_the_worker_takes_it_and_back_again_in_the_end():
    stage = Stage([], [], ahead=lambda _worker, message: message != "large")
    events = stage.run("a", "b", "c", "large", "d")
    assert len(ends(events)) == 5
    stage = Stage([None, None, "hang"], [], ahead=lambda _worker, _message: True)
    assert ends(stage.run(*"abcdef")) == [(one, f"{one}!") for one in "abcdef"]


def test_what_was_ahead_of_a_lost_worker_is_no_fault_of_it():
    stage = Stage([None, "die", None, None, "die"], ahead=lambda _worker, _message: True)
    events = stage.run("a", "b", "c")
    assert [one.message for one in events if isinstance(one, ItemGivenUp)] == ["a"]
    assert ends(one for one in events if isinstance(one, ItemAnswered)) == [("b", "b!"), ("c", "c!")]


def test_a_run_that_is_closed_leaves_answers_that_nobody_takes_for_others():
    stage = Stage([])
    events = stage.pool.run(WorkQueue("abc"), RunTerms(answer_s=1.0))
    assert next(events).answer == "a!"
    events.close()
    stage.started[0].ask("late")  # as if it had been sent ahead
    stage.pool._slots[0].asked.append(None)
    assert ends(stage.run("d")) == [("d", "d!")]


def test_a_first_item_may_be_held_back_while_somebody_is_busy():
    stage, seen = Stage([], []), []
    work = WorkQueue("ab", may_begin=lambda message: seen.append(message) or False)
    assert [event.message for event in stage.pool.run(work, RunTerms(answer_s=1.0))] == ["a", "b"]
    assert set(seen) == {"a", "b"}
    assert sorted(len(worker.asked) for worker in stage.started) in ([0, 2], [1, 1])


def test_waiting_until_ready_says_who_cannot_be_started():
    stage = Stage([], [])
    stage.pool.wait_until_ready()
    assert len(stage.pool.ready_workers) == stage.pool.size == 2
    with pytest.raises(ConfigError, match="a worker process died by the script before it was ready"):
        Stage([], ["die"]).pool.wait_until_ready()
    with pytest.raises(ConfigError, match="a robot was not ready within 5 s; plug it in"):
        Stage(["hang"], name="robot", start_s=5.0).pool.wait_until_ready(1, "; plug it in")


def test_one_that_is_enough_is_waited_for():
    stage = Stage(["hang"], [])
    stage.pool.wait_until_ready(1)
    assert (len(stage.pool.workers), len(stage.pool.ready_workers)) == (2, 1)


def test_the_peaks_of_all_are_added_up():
    stage = Stage([], [])
    stage.run("a", "b")
    assert stage.pool.peak_rss_mb == 4.0  # each says how many there were


def test_after_the_end_nothing_is_started():
    stage = Stage([])
    stage.pool.close()
    assert stage.run("a") == []
    assert stage.started == []
