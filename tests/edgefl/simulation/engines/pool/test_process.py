"""One worker process: started, replaced, ended."""

import dataclasses
import os
import signal

import pytest

from edgefl.errors import ConfigError
from edgefl.simulation.engines.fleets import TrainingMethod
from edgefl.simulation.engines.pool.messages import Begin, Chunk, Gone
from edgefl.simulation.engines.pool.process import WorkerProcess
from edgefl.simulation.engines.shared import SharedTree
from edgefl.trees import spec_of


@pytest.fixture
def parameters(set_up, plan_of):
    shared = SharedTree(spec_of(plan_of(set_up()).parameters))
    yield shared
    shared.close()


def test_a_worker_that_is_gone_says_so_and_is_replaced(set_up, plan_of, parameters):
    setup = set_up()
    plan = plan_of(setup)
    parameters.write(plan.parameters)
    worker = WorkerProcess(setup, parameters)
    worker.wait_until_ready()
    before = worker.pid
    os.kill(before, signal.SIGKILL)
    worker.ask(Chunk(plan.clients))
    assert worker.hear() == Gone("was ended by SIGKILL")
    begin = Begin(dataclasses.replace(plan, parameters={}), sums=False)
    worker.begin(begin)  # what it owed will never come
    assert (worker.pid != before, worker.ready) == (True, False)
    worker.wait_until_ready()
    worker.begin(begin)
    worker.ask(Chunk(plan.clients[:1]))
    worker.begin(begin)  # what that round owed is dropped
    worker.ask(Chunk(plan.clients[1:2]))
    answer = worker.hear()
    assert [one.device for one in answer.answers] == ["client-1"]
    worker.close()


def test_one_that_cannot_load_its_task_says_why(set_up, parameters):
    setup = dataclasses.replace(set_up(), reference="no.such:task")
    worker = WorkerProcess(setup, parameters)
    with pytest.raises(ConfigError, match=r"cannot start: .*no module 'no'"):
        worker.wait_until_ready()
    worker.close()


def test_a_population_that_cannot_be_sent_is_refused(set_up, parameters):
    setup = dataclasses.replace(set_up(), make_population=lambda _task: None)
    with pytest.raises(ConfigError, match="population cannot be sent"):
        WorkerProcess(setup, parameters)


def test_the_trial_of_stacks_is_a_workers_and_one_that_it_ends_is_replaced(set_up, parameters, tmp_path):
    worker = WorkerProcess(set_up(), parameters)
    worker.wait_until_ready()
    assert worker.why_not_stacked(TrainingMethod()) is None
    worker.close()
    worker = WorkerProcess(set_up(data={"deadly": f"1@{tmp_path}", "deaths": "1"}), parameters)
    worker.wait_until_ready()
    before = worker.pid
    assert worker.why_not_stacked(TrainingMethod()) == "the worker that tried it was ended by SIGKILL"
    worker.wait_until_ready()
    assert worker.pid != before
    assert worker.why_not_stacked(TrainingMethod()) is None
    worker.close()
