"""Samples in memory: batches, chunks and parts of structures."""

import pytest
import torch

from edgefl.training.data.sample_set import Samples

ONE = Samples(torch.arange(5), torch.arange(5) * 10)
DEEP = Samples({"a": (torch.arange(5), torch.arange(10).view(5, 2))}, (torch.arange(5) * 10,))


@pytest.mark.parametrize("samples", [ONE, DEEP])
def test_batches_hold_the_samples_at_their_positions(samples):
    batches = list(samples.batches([torch.tensor([3, 1]), torch.tensor([0])], seed=0))
    assert [len(one) for one in batches] == [2, 1]
    targets = [one.targets if samples is ONE else one.targets[0] for one in batches]
    assert [one.tolist() for one in targets] == [[30, 10], [0]]
    if samples is DEEP:
        assert batches[0].inputs["a"][1].tolist() == [[6, 7], [2, 3]]


@pytest.mark.parametrize("samples", [ONE, DEEP])
def test_parts_keep_the_form(samples):
    assert [len(one) for one in samples.chunks(2)] == [2, 2, 1]
    assert (len(samples), len(samples.first(3)), len(samples.first(9))) == (5, 3, 5)
    part = samples.chosen(torch.tensor([4]))
    assert type(part.inputs) is type(samples.inputs)
    assert samples.device.type == "cpu"


def test_a_packed_sequence_counts_its_sequences():
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2), torch.ones(1)])
    assert len(Samples(packed, torch.zeros(3))) == 3
