"""A batch of items; what is refused is tested with whole Datasets, in test_dataset."""

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from edgefl.errors import TaskError
from edgefl.task import Task
from edgefl.training.data.items import Source, batch_of, refuse_other_form
from edgefl.training.data.sample_set import Samples


def source(collate=None):
    task = Task(
        name="t", model=torch.nn.Identity, loss=torch.nn.functional.mse_loss, train_data=lambda: None, collate=collate
    )
    return Source(task=task, what="train_data", dataset=None)


ITEMS = [({"a": torch.full((2,), float(n)), "b": (n, np.full(3, n))}, (n % 2, 0.5)) for n in range(4)]


def test_items_are_stacked_as_torch_does_it():
    batch = batch_of(source(), ITEMS, range(4))
    wanted, targets = default_collate(ITEMS)
    for seen, other in ((batch.inputs["a"], wanted["a"]), (batch.inputs["b"][1], wanted["b"][1]),
                        (batch.inputs["b"][0], wanted["b"][0])):  # fmt: skip
        assert torch.equal(seen, other)
    assert batch.targets.tolist() == torch.stack([one.float() for one in targets], 1).tolist()


def test_a_collate_that_is_torchs_own_gives_the_same():
    one, other = (
        batch_of(source(collate), [(torch.ones(2) * n, torch.tensor([n])) for n in range(3)], range(3))
        for collate in (None, default_collate)
    )
    assert torch.equal(one.inputs, other.inputs)
    assert torch.equal(one.targets, other.targets)


def test_lists_that_torchs_collate_returns_are_tuples():
    batch = batch_of(source(default_collate), [((torch.ones(2), torch.ones(3)), 1)] * 2, range(2))
    assert [type(batch.inputs), *(tuple(one.shape) for one in batch.inputs)] == [tuple, (2, 2), (2, 3)]


def test_batches_of_one_form_may_have_other_shapes():
    first = Samples({"a": torch.ones(2, 3)}, torch.ones(2))
    refuse_other_form(source(), first, Samples({"a": torch.ones(1, 7)}, torch.ones(1)))
    with pytest.raises(TaskError, match=r"first a float32 \(2, 3\); target float32 \(2,\), then b float32"):
        refuse_other_form(source(), first, Samples({"b": torch.ones(2, 3)}, torch.ones(2)))
