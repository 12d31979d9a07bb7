"""Three processes train as one does: every case in float64, by real process groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgefl.training.parallel.together import BatchParts
from edgefl.trees import read_tree
from tests.edgefl.training.parallel import tasks


@pytest.mark.parametrize("name", list(tasks.CASES))
def test_the_update_is_that_of_one_process(trained, name):
    alone, together = tasks.alone(name), read_tree((trained / name).read_bytes())
    assert together.pop("_weight") == alone.weight == 11.0
    assert together.pop("_loss") == pytest.approx(alone.metrics["train_loss"], abs=1e-9)
    assert {one for one in together if "/" in one} == set(
        alone.state
    )  # optimizer/.., and with fragments own/.., base/..
    for one, array in alone.state.items():
        np.testing.assert_allclose(together[one], array, rtol=0, atol=1e-9, err_msg=one)
    changed = {one for one in alone.tree if np.abs(alone.tree[one]).max() > 1e-3}
    assert {"first.weight", "blocks.0.weight", "last.bias"} & alone.tree.keys() <= changed != set()
    for one, array in alone.tree.items():
        assert together[one].dtype == array.dtype
        np.testing.assert_allclose(together[one], array, rtol=0, atol=1e-9, err_msg=one)


def test_batch_norm_counts_its_own_samples_and_the_first_process_is_kept(trained):
    tree = read_tree((trained / "norm").read_bytes())
    assert tree["norm.num_batches_tracked"] == 3
    assert 0 < np.abs(tree["norm.running_mean"]).max() < 1


def test_a_fit_has_a_process_group_in_every_round(trained):
    for name in ("fit", "fit again"):
        tree = read_tree((trained / name).read_bytes())
        assert (tree["w"].tolist(), float(tree["_weight"])) == ([0.0 + 1 + 2], 3.0)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("other model", "disagree on the model: process 1 on 127.0.0.1 has 'norm.weight': torch.float64[4] trained"),
        ("other data", "disagree on the number of samples: process 1 on 127.0.0.1 has 12, process 0"),
        ("other sample", "disagree on the first sample: process 2 on 127.0.0.1"),
        ("few", "3 processes share batches of 32 of 2 samples, so some would have none. Lower train.processes"),
        ("small batches", "3 processes share batches of 2 of 11 samples"),
        ("backend", "train.backend='nonsense': this torch has gloo"),
        ("nothing", "its model has no parameters, so train.strategy='fsdp' has none to shard"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_all(trained, name, said):
    assert said in (trained / f"{name}.txt").read_text()


class _Rank:
    def __init__(self, rank, size):
        self.rank, self.size = rank, size


@pytest.mark.parametrize(("layer", "parts"), [(torch.nn.Linear(1, 1), [2, 2, 1]), (torch.nn.BatchNorm1d(1), [3, 2, 0])])
def test_shares_are_even_and_batch_norm_gets_two_samples(layer, parts):
    shares = [BatchParts(_Rank(rank, 3), layer) for rank in range(3)]
    taken = [next(one.of(iter([torch.arange(5)]))).tolist() for one in shares]
    assert [one.parts for one in shares] == [[part / 5] for part in parts]
    assert [number for one, part in zip(taken, parts, strict=True) if part for number in one] == list(range(5))
    assert all(taken)
