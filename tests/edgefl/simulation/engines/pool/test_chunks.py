"""Sums by the centre's own guard and rule, asked in this process."""

import numpy as np
import pytest

from edgefl.records import Failure, Update
from edgefl.simulation.engines import stacked
from edgefl.simulation.engines.fleets import TrainingMethod
from edgefl.simulation.engines.loop import LoopFleet
from edgefl.simulation.engines.pool.chunks import ChunkTrainer
from edgefl.simulation.engines.pool.messages import Chunk, Done, Flush
from edgefl.simulation.engines.stacked import StackTrainer


@pytest.fixture
def trainer_of(plan_of):
    def make(setup):
        return ChunkTrainer(setup.task, setup.population, setup.config), plan_of(setup)

    return make


def test_a_sum_holds_who_was_admitted_and_a_new_round_forgets_it(set_up, trainer_of):
    setup = set_up(data={"empty": "1", "infinite": "2"})
    trainer, plan = trainer_of(setup)
    trainer.begin(plan, sums=True)
    assert trainer.answer(Chunk(plan.clients)) == Done()
    trainer.begin(plan, sums=True)
    assert trainer.answer(Chunk(plan.clients[:4])) == Done()
    summed = trainer.answer(Flush())
    answers = [one for one in LoopFleet(setup).collect(plan) if one.device in (plan.clients[0], plan.clients[3])]
    assert summed.partial.contributors == (plan.clients[0], plan.clients[3])
    assert summed.partial.weight == sum(one.weight for one in answers)
    for name, total in summed.partial.total.items():
        np.testing.assert_allclose(total, sum(one.weight * one.tree[name] for one in answers), atol=1e-12)
    assert [type(one) for one in summed.aside] == [Failure, Update]
    assert not all(np.isfinite(array).all() for array in summed.aside[1].tree.values())  # not what came after it
    assert trainer.answer(Flush()).partial is None


def test_without_sums_answers_come_with_their_chunk(set_up, trainer_of):
    trainer, plan = trainer_of(set_up())
    trainer.begin(plan, sums=False)
    assert [one.device for one in trainer.answer(Chunk(plan.clients[:2])).answers] == ["client-0", "client-1"]
    with pytest.raises(TypeError, match="cannot answer a Flush"):
        trainer.answer(Flush())


@pytest.mark.parametrize("when", ["begin", "answers"])
def test_where_stacks_fail_a_worker_trains_one_by_one_and_says_so(set_up, trainer_of, monkeypatch, when):
    trainer, plan = trainer_of(set_up())
    monkeypatch.setattr(stacked, "MAX_STACK", 3)
    whole, calls = getattr(StackTrainer, when), []

    def failing(*arguments, **options):
        calls.append(when)
        if when == "begin" or len(calls) == 2:
            raise IndexError("a fault of ours")
        return whole(*arguments, **options)

    monkeypatch.setattr(StackTrainer, when, failing)
    trainer.begin(plan, sums=True, method=TrainingMethod(stacks=True))
    trainer.answer(Chunk(plan.clients))
    summed = trainer.answer(Flush())
    assert summed.fault == "it failed: IndexError: a fault of ours"
    assert sorted(summed.partial.contributors) == list(plan.clients)
    trainer.begin(plan, sums=True, method=TrainingMethod(stacks=True))
    trainer.answer(Chunk(plan.clients))
    assert sorted(trainer.answer(Flush()).partial.contributors) == list(plan.clients)
    assert len(calls) == (1 if when == "begin" else 2)
