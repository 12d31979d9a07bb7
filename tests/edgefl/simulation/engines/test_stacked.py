"""The stack gives what the loop gives; its batches are those that each client would go through by itself."""

import numpy as np
import pytest
import torch

from edgefl.config import TrainConfig
from edgefl.records import Partial
from edgefl.simulation.engines import stacked
from edgefl.simulation.engines.loop import LoopFleet
from edgefl.simulation.engines.stacked import StackedBatches
from edgefl.simulation.engines.stacked_fleet import StackedFleet
from edgefl.training.samples import Samples


def close(one, other):
    for name, array in one.items():
        np.testing.assert_allclose(array, other[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["task", "half"])
@pytest.mark.parametrize("rounds", [{}, {"clients": 4, "over_selection": 0.5}])
@pytest.mark.parametrize(("length", "mu"), [({"epochs": 2}, 0.0), ({"epochs": 2}, 0.5), ({"steps": 5}, 0.5)])
def test_rounds_of_ragged_clients_agree_with_the_loop(set_up, run, name, rounds, length, mu):
    train = {"batch_size": 4, "lr": 0.3, "proximal_mu": mu} | length
    setup, again = (
        set_up(name, rounds={"count": 2} | rounds, train=train) for _ in range(2)
    )  # each fetches for itself
    for one, other in zip(run(setup, StackedFleet(setup)), run(again, LoopFleet(again)), strict=True):
        close(one.parameters, other.parameters)
        assert sorted(one.admitted) == sorted(other.admitted)
        assert one.metrics == pytest.approx(other.metrics, abs=1e-12)
        assert (one.weight, one.up_bytes, one.down_bytes) == (other.weight, other.up_bytes, other.down_bytes)


def test_the_lost_and_the_refused_are_those_of_the_loop(set_up, run, monkeypatch):
    monkeypatch.setattr(stacked, "MAX_STACK", 3)
    setup = set_up(data={"empty": "2", "infinite": "3"}, rounds={"count": 1})
    (one,), (other,) = run(setup, StackedFleet(setup)), run(setup, LoopFleet(setup))
    assert (one.failed, one.rejected) == (other.failed, other.rejected)
    assert (one.up_bytes, one.down_bytes) == (other.up_bytes, other.down_bytes)
    close(one.parameters, other.parameters)


def test_one_sum_stands_for_a_stack(set_up, plan_of):
    setup = set_up()
    (answer,) = StackedFleet(setup).collect(plan_of(setup))
    assert isinstance(answer, Partial)
    assert sorted(answer.contributors) == list(setup.population.names())


def numbered(first, count):
    rows = torch.arange(first, first + count)
    return Samples(rows[:, None].float(), rows)


def alone(samples, seed, config):
    shuffle, batches = torch.Generator().manual_seed(seed), []
    while len(batches) < config.num_steps(len(samples)):
        order = torch.randperm(len(samples), generator=shuffle)
        batches += [samples.targets[chosen].tolist() for chosen in order.split(config.batch_size)]
    return batches[: config.num_steps(len(samples))]


@pytest.mark.parametrize("length", [{"epochs": 3}, {"steps": 7}])
def test_each_client_sees_its_own_batches_in_its_own_order(length):
    samples = [numbered(0, 11), numbered(100, 8), numbered(200, 3), numbered(300, 1)]
    seeds, config = [5, 6, 7, 8], TrainConfig(batch_size=4, **length)
    seen = [[] for _ in samples]
    for step in StackedBatches(samples, seeds, config):
        for k in range(len(step)):
            kept = step.mask[k] if step.mask is not None else slice(None)
            assert torch.equal(step.inputs[k, :, 0].long(), step.targets[k])
            assert step.targets[k].unique().div(100, rounding_mode="floor").unique().tolist() == [k]
            seen[k].append(step.targets[k][kept].tolist())
            assert step.counts[k] == len(seen[k][-1])
    assert seen == [alone(one, seed, config) for one, seed in zip(samples, seeds, strict=True)]


def test_full_batches_have_no_mask():
    steps = list(StackedBatches([numbered(0, 8), numbered(100, 8)], [1, 2], TrainConfig(batch_size=4)))
    assert [step.mask for step in steps] == [None, None]
    (wide,) = StackedBatches([numbered(0, 3)], [1], TrainConfig(batch_size=1000))
    assert (wide.mask, wide.inputs.shape) == (None, (1, 3, 1))
