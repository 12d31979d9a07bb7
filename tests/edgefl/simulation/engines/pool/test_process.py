"""A worker process that leaves its sums in shared memory."""

import dataclasses
from contextlib import ExitStack, closing

import numpy as np
import pytest

from edgefl.errors import ConfigError
from edgefl.process.workers.messages import Ready
from edgefl.simulation.engines.pool.messages import BeginRound, Chunk, Done, Flush
from edgefl.simulation.engines.pool.process import launcher, memory_for


@pytest.fixture
def memory(set_up, plan_of):
    plan = plan_of(set_up())
    with ExitStack() as opened:
        yield [opened.enter_context(closing(one)) for one in memory_for(plan.parameters, plan.frozen, 1)]


def test_a_sum_is_a_copy_that_later_ones_leave_alone(set_up, plan_of, memory):
    setup = set_up()
    plan = plan_of(setup)
    memory[0].write(plan.parameters)
    worker = launcher(setup, *memory)()
    assert worker.receive() == Ready()
    summed = []
    for clients in (plan.clients[:2], plan.clients[2:4]):
        worker.ask(BeginRound(dataclasses.replace(plan, parameters={}, frozen={}), sums=True))
        worker.ask(Chunk(clients))
        worker.ask(Flush())
        assert worker.receive().answer == Done()
        summed.append(worker.receive().answer.partial)
    assert [one.contributors for one in summed] == [plan.clients[:2], plan.clients[2:4]]
    assert all(array.dtype == np.float64 for array in summed[0].total.values())
    assert any((array != summed[1].total[name]).any() for name, array in summed[0].total.items())
    for name, array in summed[1].total.items():
        np.testing.assert_array_equal(array, memory[2].tree[name])
    worker.end(kindly=True)


def test_a_population_that_cannot_be_sent_is_refused(set_up, memory):
    setup = dataclasses.replace(set_up(), make_population=lambda _task: None)
    with pytest.raises(ConfigError, match="population cannot be sent"):
        launcher(setup, *memory)
