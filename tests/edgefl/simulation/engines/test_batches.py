"""Batches side by side are those that each client would go through by itself."""

import torch

from edgefl.config import TrainConfig
from edgefl.simulation.engines.stacked import StackedBatches
from edgefl.training.samples import Samples


def numbered(first, count):
    rows = torch.arange(first, first + count)
    return Samples(rows[:, None].float(), rows)


def alone(samples, seed, config):
    shuffle, batches = torch.Generator().manual_seed(seed), []
    for _ in range(config.epochs):
        order = torch.randperm(len(samples), generator=shuffle)
        batches += [samples.targets[chosen].tolist() for chosen in order.split(config.batch_size)]
    return batches


def test_each_client_sees_its_own_batches_in_its_own_order():
    samples = [numbered(0, 11), numbered(100, 8), numbered(200, 3), numbered(300, 1)]
    seeds, config = [5, 6, 7, 8], TrainConfig(batch_size=4, epochs=3)
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
