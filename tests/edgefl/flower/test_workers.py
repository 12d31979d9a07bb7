"""Real worker processes: the same answers, and none lost with a worker that dies."""

import itertools
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from edgefl.flower import load_flower_app, run_flower_app
from edgefl.flower import workers as workers_module
from edgefl.flower.internals import ErrorCode, give_id, task_identity
from edgefl.flower.nodes import Delivery
from edgefl.flower.runners import Runners
from edgefl.flower.workers import Workers
from edgefl.process.workers.process import wait_for_processes

CLIENT = """
    import os, signal, threading
    from pathlib import Path
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.query()
    def query(message, context):
        given = message.content["c"]
        given["touched"] = [*given.get("touched", []), 1]  # this client's own to change
        once = given.get("die-once")
        if given.get("die") == context.node_id or once and not Path(once).exists():
            Path(once or os.devnull).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if given.get("hang") == context.node_id:
            threading.Event().wait()
        seen = context.state.get("seen", ConfigRecord({"n": 0}))
        context.state["seen"] = ConfigRecord({"n": seen["n"] + 1})
        touched = len(given["touched"])
        echo = given.get("echo", b"")
        answer = ConfigRecord({"pid": os.getpid(), "node": context.node_id, "n_touched": touched, "echo": echo,
                               "threads": os.environ.get("OMP_NUM_THREADS", "")})
        return Message(RecordDict({"a": answer}), reply_to=message)
"""


@pytest.fixture
def app(make_app):
    with task_identity(1):
        yield load_flower_app(make_app(client=CLIENT))


def deliveries(count, **config):
    content = RecordDict({"c": ConfigRecord(config)})
    for number in range(count):
        message = Message(content, 1000 + number, "query")
        give_id(message, str(number))
        yield Delivery(message, Context(1, 1000 + number, {}, RecordDict(), {}))


def answered(runner, asked, seconds=30.0):
    return sorted(runner.run(asked, seconds), key=lambda answer: answer.node_id)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(("chosen", "threads"), [(None, "1"), ("3", "3")])
def test_answers_and_states_come_back_and_nothing_is_left_running(app, monkeypatch, chosen, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    with Workers(app, 2) as workers:
        answers = answered(workers, deliveries(6))
        pids = workers.pids()
    assert [answer.reply.content["a"]["node"] for answer in answers] == list(range(1000, 1006))
    assert [answer.state["seen"]["n"] for answer in answers] == [1] * 6
    assert [answer.reply.content["a"]["n_touched"] for answer in answers] == [1] * 6
    assert {answer.reply.content["a"]["pid"] for answer in answers} <= set(pids)
    assert os.getpid() not in pids
    assert workers.peak_rss_mb > 0
    assert not any(map(alive, pids))
    assert {answer.reply.content["a"]["threads"] for answer in answers} == {threads}
    assert os.environ.get("OMP_NUM_THREADS") == chosen


def test_a_killed_workers_message_is_done_again(app, tmp_path):
    with Workers(app, 1) as workers:
        answers = answered(workers, deliveries(3, **{"die-once": str(tmp_path / "died")}))
    assert (tmp_path / "died").exists()
    assert [answer.reply.has_error() for answer in answers] == [False] * 3


def test_a_worker_killed_from_outside_between_messages_is_replaced(app):
    with Workers(app, 1) as workers:
        answered(workers, deliveries(1))
        os.kill(workers.pids()[0], signal.SIGKILL)
        assert not answered(workers, deliveries(1))[0].reply.has_error()


def test_a_message_that_kills_its_workers_is_answered_for_and_the_others_are_done(app):
    with Workers(app, 2) as workers:
        answers = answered(workers, deliveries(4, die=1002))
    assert [answer.reply.has_error() for answer in answers] == [False, False, True, False]
    error = answers[2].reply.error
    assert error.code == ErrorCode.CLIENT_APP_CRASHED
    assert "died 2 times over this message; the last one was ended by SIGKILL" in error.reason


def test_a_client_that_hangs_is_killed_and_takes_no_other_with_it(app):
    with Workers(app, 1) as workers:  # the others have to wait for it, one of them is in its process already
        answered(workers, deliveries(1))
        answers = answered(workers, deliveries(4, hang=1001), seconds=5)
        assert [answer.node_id for answer in answers] == [1000, 1002, 1003]
        assert len(answered(workers, deliveries(2))) == 2


def test_an_app_that_hangs_where_it_is_loaded_holds_nobody_up_for_ever(app, monkeypatch):
    monkeypatch.setattr(workers_module, "LOAD_S", 1.0)
    file = app.folder / app.name / "client_app.py"
    file.write_text(f"import threading\nthreading.Event().wait()\n{file.read_text()}")
    with Workers(app, 1) as workers:
        assert answered(workers, deliveries(2), seconds=1) == []


def test_the_time_that_the_app_takes_to_load_is_no_clients(app):
    file = app.folder / app.name / "client_app.py"
    file.write_text(f"import time\ntime.sleep(3)\n{file.read_text()}")
    with Workers(app, 1) as workers:
        assert len(answered(workers, deliveries(2), seconds=2)) == 2


def test_an_answer_that_is_there_counts_however_late_it_is_looked_for(app):
    now_s = 0.0
    with Workers(app, 2, lambda: now_s) as workers:
        answers = workers.run(deliveries(4), 30)
        next(answers)
        slot = next(one for one in workers._pool._slots if one.asked)
        assert wait_for_processes([slot.worker], 30.0)
        now_s = 1000.0  # the ServerApp was long at work on the first
        assert len(list(answers)) >= 1


def test_who_stops_asking_leaves_the_rest_undone(app):
    source = deliveries(100)
    with Workers(app, 1) as workers:
        answers = workers.run(source, 30)
        next(answers)
        answers.close()
    assert len(list(source)) > 90


def test_an_app_that_cannot_be_loaded_there_is_reported_as_flower_does(app):
    (app.folder / app.name / "client_app.py").write_text("import nothing_of_the_kind\n")
    with Workers(app, 1) as workers:
        error = answered(workers, deliveries(1))[0].reply.error
    assert error.code == ErrorCode.LOAD_CLIENT_APP_EXCEPTION
    assert "client_app.py:1" in error.reason


def test_an_app_that_kills_every_process_that_loads_it_is_answered_with_errors(app):
    file = app.folder / app.name / "client_app.py"
    file.write_text(f"import os\nos._exit(7)\n{file.read_text()}")
    with Workers(app, 1) as workers:
        errors = [answer.reply.error for answer in answered(workers, deliveries(3))]
    assert len(errors) == 3
    assert all(
        "died 3 times before it had loaded the app; the last one ended with status 7" in e.reason for e in errors
    )
    assert {error.code for error in errors} == {ErrorCode.CLIENT_APP_CRASHED}


def test_a_run_in_workers_equals_the_run_in_this_process(make_app):
    folder = make_app()
    here = run_flower_app(load_flower_app(folder), 4, workers=0)
    there = run_flower_app(load_flower_app(folder), 4, workers=2)
    assert (here.num_workers, there.num_workers) == (0, 2)
    np.testing.assert_allclose(there.arrays.to_numpy_ndarrays()[0], here.arrays.to_numpy_ndarrays()[0], rtol=1e-12)
    assert there.final == pytest.approx(here.final)


def test_a_long_run_goes_on_here_while_workers_start_and_moves_when_they_are_ready(app):
    def spaced():
        for number, delivery in enumerate(deliveries(8)):
            if number == 4:  # three were done here, and one more while they start
                end_s = time.monotonic() + 60
                while not runners._workers.ready and time.monotonic() < end_s:
                    time.sleep(0.05)
            yield delivery

    ticks = itertools.count()  # a second a look: each client takes one
    with Runners(app, None, lambda: float(next(ticks))) as runners:
        runners._number = 2  # as on two cores
        runners._left_s = 3.0
        answers = list(runners.run(spaced(), float("1e9")))
        assert runners.num_workers == 2
    pids = [answer.reply.content["a"]["pid"] for answer in sorted(answers, key=lambda answer: answer.node_id)]
    assert pids[:4] == [os.getpid()] * 4
    assert os.getpid() not in pids[5:]  # the fifth was asked for before they were looked at
    assert len(pids) == 8


def test_large_messages_of_their_own_for_each_node_pass_both_ways(app):
    def large():
        for delivery in deliveries(12):
            delivery.message.content = RecordDict({"c": ConfigRecord({"echo": os.urandom(1 << 20)})})
            yield delivery

    with Workers(app, 2) as workers:
        answers = answered(workers, large())
    assert [answer.node_id for answer in answers] == list(range(1000, 1012))
    assert {len(answer.reply.content["a"]["echo"]) for answer in answers} == {1 << 20}


def test_several_threads_share_the_workers(app):
    with Workers(app, 2) as workers, ThreadPoolExecutor(5) as pool:
        asked = [[delivery] for delivery in deliveries(10)]
        answers = [one for each in pool.map(lambda some: answered(workers, some), asked) for one in each]
    assert [answer.node_id for answer in answers] == list(range(1000, 1010))


def test_answers_that_nobody_waits_for_are_not_taken_for_later_ones(app):
    with Workers(app, 1) as workers:
        first = workers.run(deliveries(5), 30)
        next(first)
        first.close()  # the worker has been sent another one
        answers = answered(workers, (one for one in deliveries(9) if one.context.node_id > 1006))
    assert [answer.node_id for answer in answers] == [1007, 1008]
