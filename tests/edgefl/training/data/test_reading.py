"""The tensors that values of a user's code become."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from edgefl.errors import TaskError
from edgefl.task import Task
from edgefl.training.data.reading import num_samples, pair_of, tensors_of
from edgefl.training.structures import described, leaves

TASK = Task(name="t", model=torch.nn.Identity, loss=torch.nn.functional.mse_loss, train_data=lambda: None)


class Pair(NamedTuple):
    left: object
    right: object


@pytest.mark.parametrize(
    ("value", "lists", "seen"),
    [
        ([1, 2], False, "x int64 (2,)"),
        ([1.0, 2.0], True, "x float32 (2,)"),
        ([[1, 2], [3, 4]], True, "x int64 (2, 2)"),
        (3, True, "x int64 ()"),
        (0.5, True, "x float32 ()"),
        (np.float64(0.5), True, "x float32 ()"),
        (True, True, "x bool ()"),
        ([np.ones(2), np.ones(2)], False, "x float32 (2, 2)"),
        ([np.ones(2), np.ones(3)], True, "x_0 float32 (2,), x_1 float32 (3,)"),
        ((np.ones(2), [np.ones(2), np.ones(2)]), False, "x_0 float32 (2,), x_1 float32 (2, 2)"),
        ({"a": ((1, 2), np.ones(1))}, False, "a.0 int64 (2,), a.1 float32 (1,)"),
        (Pair(np.ones(1), 3), False, "left float32 (1,), right int64 ()"),
        (torch.ones(2, dtype=torch.float64), False, "x float64 (2,)"),
    ],
)
def test_values_become_tensors(value, lists, seen):
    found = tensors_of(TASK, "what", value, lists=lists)
    assert described(found, "x") == seen
    assert all(isinstance(one, torch.Tensor) for one in leaves(found))
    if isinstance(value, Pair):
        assert isinstance(found, Pair)


def test_a_packed_sequence_stays():
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3)])
    assert tensors_of(TASK, "what", (packed, np.ones(1)))[0] is packed


def test_a_list_of_arrays_that_do_not_fit_together_says_what_to_return():
    with pytest.raises(
        TaskError, match=r"reading what raised ValueError: a list is one array, sample by sample.* a tuple"
    ):
        tensors_of(TASK, "what", [np.ones(2), np.ones(3)])


def test_a_pair_may_be_a_list():
    assert pair_of(TASK, "what", [1, 2]) == (1, 2)
    with pytest.raises(TaskError, match=r"^task 't': what returned 3 values, not a or b$"):
        pair_of(TASK, "what", (1, 2, 3), "a or b")


def test_samples_are_counted_over_all_leaves():
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(1)])
    assert num_samples(TASK, "what", {"a": torch.ones(2, 3), "b": packed}, (torch.ones(2),)) == 2
    with pytest.raises(
        TaskError, match=r"input float32 \(2,\); target_0 float32 \(2,\), target_1 float32 \(1,\): the fir"
    ):
        num_samples(TASK, "what", torch.ones(2), (torch.ones(2), torch.ones(1)))
