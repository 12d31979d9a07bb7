"""A worker's answers, asked in this process: sums by the centre's own guard and rule."""

import pickle

import numpy as np
import pytest

from edgefl.errors import ConfigError
from edgefl.records import Failure, Update
from edgefl.simulation.engines.loop import LoopFleet
from edgefl.simulation.engines.pool.messages import BeginRound, Chunk, Done, Flush, Summed
from edgefl.simulation.engines.pool.worker import PoolStart
from edgefl.simulation.engines.shared import SharedTree
from edgefl.trees import TensorSpec, spec_of


class Answering:
    def __init__(self, answer):
        self.answer = answer


@pytest.fixture
def worker_of(plan_of):
    opened = []

    def make(setup):
        plan = plan_of(setup)
        parameters = SharedTree(spec_of(plan.parameters))
        sums = SharedTree({n: TensorSpec(a.shape, np.dtype(np.float64)) for n, a in plan.parameters.items()})
        frozen = SharedTree(spec_of(plan.frozen))
        opened.extend([parameters, sums, frozen])
        parameters.write(plan.parameters)
        frozen.write(plan.frozen)
        start = PoolStart(
            reference=setup.reference, task=None, make_population=setup.make_population, config=setup.config,
            spec=spec_of(plan.parameters), parameters=parameters.descriptor, sums=sums.descriptor,
            frozen_spec=spec_of(plan.frozen), frozen=frozen.descriptor,
            states=setup.states,
        )  # fmt: skip
        return Answering(start.begin()), plan, sums

    yield make
    for one in opened:
        one.close()


def test_the_sum_is_the_weighted_sum_and_what_is_refused_stands_aside(set_up, worker_of):
    setup = set_up(data={"empty": "2", "infinite": "3"})
    worker, plan, sums = worker_of(setup)
    assert worker.answer(BeginRound(plan, sums=True)) is None
    for start in range(0, 8, 3):
        assert worker.answer(Chunk(plan.clients[start : start + 3])) == Done()
    summed = worker.answer(Flush())
    assert isinstance(summed, Summed)
    assert summed.partial is not None
    assert [type(one) for one in summed.aside] == [Failure, Update]
    answers = [one for one in LoopFleet(setup).collect(plan) if isinstance(one, Update) and one.device != "client-3"]
    assert summed.partial.contributors == tuple(one.device for one in answers)
    assert summed.partial.weight == sum(one.weight for one in answers)
    for name in plan.parameters:
        np.testing.assert_allclose(sums.tree[name], sum(one.weight * one.tree[name] for one in answers), atol=1e-12)
    empty = worker.answer(Flush())
    assert (empty.partial, empty.aside) == (None, ())


def test_single_updates_come_with_their_chunk(set_up, worker_of):
    worker, plan, _ = worker_of(set_up())
    worker.answer(BeginRound(plan, sums=False))
    done = worker.answer(Chunk(plan.clients[:2]))
    assert [one.device for one in done.answers] == ["client-0", "client-1"]
    with pytest.raises(TypeError, match="cannot answer a Flush"):
        worker.answer(Flush())


def start_of(setup, **changes):
    given = {"reference": None, "task": None, "parameters": 0, "frozen": 0, "sums": 0, "spec": {}, "frozen_spec": {}}
    return PoolStart(make_population=setup.make_population, config=setup.config, states=setup.states, **given | changes)


def test_a_task_is_loaded_by_its_reference_or_comes_with_the_start(set_up):
    setup = set_up()
    assert start_of(setup, reference=setup.reference).load_task().name == "small"
    assert start_of(setup, task=pickle.dumps(setup.task)).load_task().train_data is setup.task.train_data
    with pytest.raises(ConfigError, match="sent a dict"):
        start_of(setup, task=pickle.dumps({})).load_task()
