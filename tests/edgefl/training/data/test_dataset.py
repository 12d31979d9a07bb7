"""A Dataset gives what arrays of the same data give, bit for bit, however it is read; what cannot be read is named."""

import dataclasses
import os
import random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from edgefl.config import TrainConfig
from edgefl.errors import ConfigError, TaskError
from edgefl.task import Task
from edgefl.training import evaluate, initial_parameters, train_locally
from edgefl.training.data.dataset import DatasetSamples
from edgefl.training.samples import Samples, train_samples

mse = torch.nn.functional.mse_loss
CONFIG = TrainConfig(batch_size=4, epochs=2, lr=0.1)
INPUTS = np.random.default_rng(0).normal(size=(11, 3))  # float64, as numpy's default
TARGETS = INPUTS[:, :1] * 2


class Items(Dataset):
    def __init__(self, number=11, item=lambda n: (INPUTS[n], TARGETS[n])):
        self.number, self.item, self.read = number, item, []

    def __len__(self):
        return self.number

    def __getitem__(self, n):
        self.read.append(n)
        return self.item(n)


def model():
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))


def task_of(load, make=model, collate=None, test=None):
    return Task(name="t", model=make, loss=mse, train_data=load, test_data=test or load, collate=collate)


def trained(task, config=CONFIG):
    return train_locally(task, initial_parameters(task), config, options={}, round=1, client="c")


def same(one, other):
    assert (one.weight, dict(one.metrics)) == (other.weight, dict(other.metrics))
    assert all(np.array_equal(array, other.tree[name]) for name, array in one.tree.items())


ARRAYS = task_of(lambda: (INPUTS, TARGETS))


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("settings", [{}, {"algorithm": "fedsgd"}])
def test_the_update_is_that_of_arrays_with_any_number_of_workers(workers, settings):
    config = dataclasses.replace(CONFIG, **settings)
    wanted = trained(ARRAYS, config)
    same(trained(task_of(Items), dataclasses.replace(config, workers=workers)), wanted)


@pytest.mark.parametrize(
    "dataset",
    [
        Items(item=lambda n: (torch.from_numpy(INPUTS[n]).float(), TARGETS[n].astype(np.float32))),
        Items(item=lambda n: [INPUTS[n].tolist(), [float(TARGETS[n, 0])]]),
        TensorDataset(torch.from_numpy(INPUTS).float(), torch.from_numpy(TARGETS).float()),
        Subset(Items(item=lambda n: (INPUTS[10 - n], TARGETS[10 - n])), list(range(10, -1, -1))),
    ],
    ids=["tensors", "lists of numbers", "TensorDataset", "Subset"],
)
def test_items_of_any_kind_give_the_same(dataset):
    same(trained(task_of(lambda: dataset)), trained(ARRAYS))


def test_the_evaluation_is_that_of_arrays():
    parameters = initial_parameters(ARRAYS)
    assert evaluate(task_of(Items), parameters) == evaluate(ARRAYS, parameters)


def test_structures_of_items_give_what_structures_of_arrays_give():
    class Two(torch.nn.Linear):
        def forward(self, left, right):
            return super().forward(torch.cat([left, right], 1))

    def make():
        return Two(3, 1)

    arrays = task_of(lambda: ((INPUTS[:, :1], INPUTS[:, 1:]), TARGETS), make)
    dicts = Items(item=lambda n: ({"right": INPUTS[n, 1:], "left": INPUTS[n, :1]}, TARGETS[n]))
    for items in (Items(item=lambda n: ((INPUTS[n, :1], INPUTS[n, 1:]), TARGETS[n])),
                  Items(item=lambda n: ([INPUTS[n, :1], INPUTS[n, 1:]], TARGETS[n])), dicts):  # fmt: skip
        same(trained(task_of(lambda items=items: items, make)), trained(arrays))


def test_float64_stays_for_a_model_in_float64():
    def make():
        return torch.nn.Linear(3, 1, dtype=torch.float64)

    same(trained(task_of(Items, make)), trained(task_of(lambda: (INPUTS, TARGETS), make)))


def test_only_the_items_of_a_batch_are_read_and_in_its_order():
    dataset = Items(number=1_000_000, item=lambda n: (np.array([n]), np.array([0.0])))
    samples = train_samples(task_of(lambda: dataset), {})
    assert isinstance(samples, DatasetSamples)
    (batch,) = samples.batches([torch.tensor([999_999, 3])], seed=0)
    assert batch.inputs.tolist() == [[999_999], [3]]
    assert dataset.read == [999_999, 3]
    part = samples.chosen(slice(10, 15)).chosen(torch.tensor([4, 0]))
    assert [len(part), part.first(9).inputs.tolist()] == [2, [[14], [10]]]


def augmented(n):
    return INPUTS[n] + np.random.normal() + torch.rand(()).item() + random.random(), TARGETS[n]


@pytest.mark.parametrize("workers", [1, 3])
def test_random_numbers_of_reading_do_not_depend_on_the_workers(workers):
    task = task_of(lambda: Items(item=augmented))
    one = trained(task)
    same(trained(task, dataclasses.replace(CONFIG, workers=workers)), one)
    assert not np.array_equal(one.tree["0.weight"], trained(ARRAYS).tree["0.weight"])


def test_random_numbers_of_reading_differ_between_batches_epochs_and_rounds():
    samples = train_samples(task_of(lambda: Items(item=augmented)), {})
    order = [torch.tensor([0]), torch.tensor([0])]
    first, second = samples.batches(order, seed=1)
    (other, _) = samples.batches(order, seed=2)
    (again, _) = samples.batches(order, seed=1)
    assert len({float(one.inputs[0, 0]) for one in (first, second, other, again)}) == 3
    assert torch.equal(first.inputs, again.inputs)


def test_reading_changes_no_random_state():
    samples = train_samples(task_of(lambda: Items(item=augmented)), {})
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    list(samples.chunks(4))
    assert torch.equal(torch.rand(2), wanted)


def pad(items):
    lengths = torch.tensor([len(words) for words, _ in items])
    words = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(words) for words, _ in items], batch_first=True)
    return {"words": words, "lengths": lengths}, torch.tensor([[label] for _, label in items])


def pack(items):
    packed = torch.nn.utils.rnn.pack_sequence([torch.as_tensor(words) for words, _ in items], enforce_sorted=False)
    return packed, torch.tensor([[label] for _, label in items])


class Lstm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.head = torch.nn.Embedding(9, 4), torch.nn.LSTM(4, 3), torch.nn.Linear(3, 1)

    def embedded(self, packed):
        return packed._replace(data=self.embed(packed.data))

    def forward(self, packed):
        _, (last, _) = self.lstm(self.embedded(packed))
        return self.head(last[0])


class PaddedLstm(Lstm):
    def forward(self, words, lengths):
        return super().forward(
            torch.nn.utils.rnn.pack_padded_sequence(words, lengths, batch_first=True, enforce_sorted=False)
        )


class Transformer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(9, 4)
        self.layer = torch.nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.head = torch.nn.Linear(4, 1)

    def forward(self, words, lengths):
        hidden = torch.arange(words.shape[1]) >= lengths[:, None]
        return self.head(self.layer(self.embed(words), src_key_padding_mask=hidden)[:, 0])


def sentence(n):
    return [1 + (n + k) % 8 for k in range(1 + n % 5)], float(n % 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_ragged_sequences_are_packed_or_padded(workers):
    config = dataclasses.replace(CONFIG, workers=workers)
    packed = trained(task_of(lambda: Items(23, sentence), Lstm, pack), config)
    padded = trained(task_of(lambda: Items(23, sentence), PaddedLstm, pad), config)
    for name, array in packed.tree.items():
        np.testing.assert_allclose(padded.tree[name], array, atol=1e-6)
    assert np.abs(packed.tree["embed.weight"]).max() > 0
    for make, collate in ((Lstm, pack), (PaddedLstm, pad), (Transformer, pad)):
        task = task_of(lambda: Items(200, sentence), make, collate)
        assert np.isfinite(evaluate(task, trained(task, config).tree)["loss"])


class Sentences:
    """Looks like a Hugging Face Dataset: items are dicts, and read together."""

    def __init__(self):
        self.together = []

    def __len__(self):
        return 23

    def __getitem__(self, n):
        words, label = sentence(n)
        return {"words": words, "label": label, "text": "not a number"}

    def __getitems__(self, positions):
        self.together.append(positions)
        return [self[n] for n in positions]


def test_items_that_are_dicts_need_a_collate_and_are_read_together():
    held = Sentences()
    task = task_of(lambda: held, PaddedLstm, lambda items: pad([(one["words"], one["label"]) for one in items]))
    same(trained(task), trained(task_of(lambda: Items(23, sentence), PaddedLstm, pad)))
    assert {len(positions) for positions in held.together} == {8, 4, 3}  # the check of the loss, batches, the last one
    with pytest.raises(
        TaskError, match=r"item 0 of train_data's Dataset is a dict of words, label, text, not \(inputs"
    ):
        trained(task_of(lambda: held, PaddedLstm))


def fails(n):
    if n == 7:
        raise KeyError("no such file")
    return INPUTS[n], TARGETS[n]


def odd(what):
    return lambda n: what if n == 7 else (INPUTS[n], TARGETS[n])


def changing(items):
    part = {"a": torch.zeros(len(items), 3)}
    return (part if len(items) == 4 else {"a": part["a"].double()}), torch.zeros(len(items), 1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("items", "collate", "said"),
    [
        (
            fails,
            None,
            r"reading item \d+ of train_data's Dataset raised KeyError: 'no such file' \(.*test_dataset.py:\d+",
        ),
        (
            odd((INPUTS[7, :2], TARGETS[7])),
            None,
            r"are input float32 \(\d,\), those of item \d+ input float32 \(\d,\): th",
        ),
        (odd(({"a": INPUTS[7]}, TARGETS[7])), None, r"those of item \d+ .*Give the task a collate, which may pad them"),
        (odd((INPUTS[7], 1)), None, r"the targets of item \d+ of train_data's Dataset are target"),
        (odd(INPUTS[7]), None, r"item 7 of train_data's Dataset is a ndarray, not \(inputs, targets\)"),
        (odd((1, 2, 3)), None, r"item 7 of train_data's Dataset is 3 values, not"),
        (odd(("word", 1)), None, r"item 7 of train_data's Dataset: its inputs are <U4 and not numbers"),
        (odd(({}, 1)), None, r"item 7 of train_data's Dataset: its inputs are an empty dict, without any tensor"),
        (odd((None, 1)), None, r"item 7 of train_data's Dataset: its inputs are object and not numbers"),
        (odd((1, 1)), lambda items: 1 / 0, r"collate raised ZeroDivisionError: division by zero \(.*test_dataset.py"),
        (odd((1, 1)), lambda items: items[0][0], r"collate returned ndarray, not \(inputs, targets\)"),
        (odd((1, 1)), lambda items: None, r"collate returned NoneType, not \(inputs, targets\)"),
        (
            odd((1, 1)),
            lambda items: ({"a": torch.zeros(4, 3), "b": torch.zeros(3, 2)}, torch.zeros(4)),
            r"collate returned a float32 \(4, 3\), b float32 \(3, 2\); target float32 \(4,\): the first dimension",
        ),
        (
            odd((1, 1)),
            lambda items: (torch.zeros(4, 3), torch.zeros(3, 1)),
            r"collate returned 4 inputs but 3 targets: input float32 \(4, 3\); target float32 \(3, 1\)",
        ),
        (
            odd((1, 1)),
            lambda items: (torch.zeros(2, 3), torch.zeros(2, 1)),
            r"collate returned 2 samples for \d items of train_data's Dataset: input float32 \(2, 3\)",
        ),
        (odd((1, 1)), lambda items: ({}, torch.zeros(4)), "collate's inputs are an empty dict, without any tensor"),
        (odd((1, 1)), lambda items: (torch.zeros(()), torch.zeros(4)), "collate's inputs are a single number"),
    ],
)
def test_what_cannot_be_a_batch_is_refused_by_name(workers, items, collate, said):
    samples = train_samples(task_of(lambda: Items(item=items), collate=collate), {}, workers=workers)
    with pytest.raises(TaskError, match=said):
        list(samples.chunks(4))


@pytest.mark.parametrize(
    ("collate", "said"),
    [
        (changing, r"differ in structure or dtype: first a float32 \(4, 3\); target .*, then a float64 \(3, 3\)"),
        (
            lambda items: (
                torch.zeros(len(items), 3) if len(items) == 4 else (torch.zeros(3, 3),),
                torch.zeros(len(items)),
            ),
            r"first input float32 \(4, 3\); target .*, then input_0 float32 \(3, 3\)",
        ),
    ],
)
def test_batches_of_different_structure_are_refused(collate, said):
    samples = train_samples(task_of(Items, collate=collate), {})
    with pytest.raises(TaskError, match=said):
        list(samples.chunks(4))


class NoLength(Items):
    def __len__(self):
        raise OSError("the disk is gone")


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(3)

    def __len__(self):
        return 3


@pytest.mark.parametrize(
    ("loaded", "said"),
    [
        (Items(0), r"the device has no data: train_data returned 0 samples \(options: none\)"),
        (NoLength(), r"the length of train_data's Dataset raised OSError: the disk is gone"),
        (Stream(), r"train_data returned a Stream, which can only be iterated; expected a map-style Dataset"),
        ({"a": INPUTS}, r"train_data returned dict, not \(inputs, targets\) or a Dataset"),
        ([(1, 2), (1, 2), (1, 2)], r"train_data returned 3 values, not"),
        (INPUTS, r"train_data returned ndarray, not"),
        ("text", r"train_data returned str, not"),
    ],
)
def test_what_is_no_dataset_is_refused(loaded, said):
    with pytest.raises(TaskError, match=said):
        train_samples(task_of(lambda: loaded), {})


def dies(n):
    if n == 7:
        os._exit(3)
    return INPUTS[n], TARGETS[n]


def test_a_worker_that_dies_is_an_error():
    samples = train_samples(task_of(lambda: Items(item=dies)), {}, workers=1)
    with pytest.raises(
        TaskError, match=r"reading train_data raised RuntimeError: DataLoader worker .* exited unexpect"
    ):
        list(samples.chunks(4))


def test_the_number_of_workers_is_bounded():
    with pytest.raises(ConfigError, match=r"train\.workers=65 must be 0 or more, and at most 64"):
        TrainConfig(workers=65)


def test_arrays_stay_in_memory():
    assert isinstance(train_samples(ARRAYS, {}), Samples)
