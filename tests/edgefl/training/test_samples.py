"""What the user's loader returns becomes tensors, or a TaskError that says what to check."""

import sys

import numpy as np
import pytest
import torch

from edgefl.errors import MissingExtra, TaskError
from edgefl.task import Task
from edgefl.training.samples import computing_device, require_torch, train_samples
from edgefl.training.samples import test_samples as held_out_samples
from edgefl.trees import bfloat16


def task_of(loader, test_loader=None):
    return Task(
        name="t", model=torch.nn.Identity, loss=torch.nn.functional.mse_loss, train_data=loader, test_data=test_loader
    )


def loaded(inputs, targets, **options):
    return train_samples(task_of(lambda **_: (inputs, targets)), options)


def test_numpys_float64_becomes_float32_and_integers_stay():
    samples = loaded(np.array([[0.5], [1.5]]), np.array([3, 4]))
    assert (samples.inputs.dtype, samples.targets.dtype, len(samples)) == (torch.float32, torch.int64, 2)
    assert samples.inputs.tolist() == [[0.5], [1.5]]


def test_tensors_keep_their_dtype():
    samples = loaded(torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3))
    assert samples.inputs.dtype == torch.float64
    assert samples.inputs.device.type == computing_device().type


@pytest.mark.parametrize(
    "array",
    [
        np.frombuffer(np.arange(4, dtype=np.float32).tobytes(), np.float32),  # read-only
        np.arange(4, dtype=np.float32)[::-1][::-1],
        np.arange(4, dtype=">f4"),
        [0.0, 1.0, 2.0, 3.0],
    ],
)
def test_arrays_of_any_layout_are_read(array):
    assert loaded(array, array).inputs.tolist() == [0, 1, 2, 3]


def test_chunks_are_in_order_and_the_last_may_be_short():
    samples = loaded(np.arange(5), np.arange(5))
    assert [chunk.inputs.tolist() for chunk in samples.chunks(2)] == [[0, 1], [2, 3], [4]]


def test_options_reach_the_loader_as_strings():
    def load(part="0"):
        return np.full((1, 1), int(part)), np.zeros(1)

    assert train_samples(task_of(load), {"part": "7"}).inputs.tolist() == [[7]]


def test_no_data_says_what_to_check():
    with pytest.raises(
        TaskError, match=r"no data: train_data returned 0 samples \(options: part=3\).*agent start --data"
    ):
        loaded(np.zeros((0, 2)), np.zeros(0), part="3")


def test_an_option_that_the_loader_does_not_take():
    def load(part="0"):
        raise AssertionError

    with pytest.raises(TaskError, match=r"train_data\(part='0'\) cannot take the data options \{'prat': '1'\}"):
        train_samples(task_of(load), {"prat": "1"})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "returned NoneType, not"),
        (np.zeros(3), "returned ndarray, not"),
        ((1, 2, 3), "returned 3 values"),
        ((np.zeros(3), np.zeros(2)), "3 inputs but 2 targets"),
        ((np.zeros(()), np.zeros(())), "inputs are a single number"),
        ((np.array(["a"]), np.zeros(1)), "inputs are <U1 and not numbers"),
        ((np.zeros(1), np.array([None])), "targets are object and not numbers"),
        (([[1], [2, 3]], np.zeros(2)), "reading train_data's inputs raised ValueError"),
    ],
)
def test_nonsense_from_the_loader(value, message):
    with pytest.raises(TaskError, match=message):
        train_samples(task_of(lambda: value), {})


def test_a_loader_that_raises_is_told_with_its_line():
    def load():
        raise FileNotFoundError("no data.csv")

    with pytest.raises(TaskError, match=rf"train_data raised FileNotFoundError: no data.csv \({__file__}:\d+\)"):
        train_samples(task_of(load), {})


def test_a_task_without_the_loader_that_is_wanted():
    fitted = Task(name="f", initial=dict, fit=lambda *_: None)
    with pytest.raises(TaskError, match="no train_data"):
        train_samples(fitted, {})
    with pytest.raises(TaskError, match="no test_data"):
        held_out_samples(fitted, {})


def test_held_out_samples_come_from_test_data():
    task = task_of(lambda: None, lambda: (np.ones(2), np.ones(2)))
    assert len(held_out_samples(task, {})) == 2


def test_torch_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtra, match=r"local training needs the \[train\] extra"):
        require_torch("local training")


def makes_float64():
    return torch.nn.Linear(2, 1, dtype=torch.float64)


@pytest.mark.parametrize("make", [makes_float64, lambda: torch.nn.Sequential(torch.nn.Linear(1, 1), makes_float64())])
def test_float64_stays_as_it_is_where_the_model_is_in_float64(make):
    value = 1.0 + 2.0**-40
    task = Task(
        name="t", model=make, loss=torch.nn.functional.mse_loss,
        train_data=lambda: (np.array([[value, 0.0]]), np.array([[value]])),
    )  # fmt: skip
    samples = train_samples(task, {})
    assert (samples.inputs.dtype, samples.targets.dtype) == (torch.float64, torch.float64)
    assert (samples.inputs[0, 0].item(), samples.targets[0, 0].item()) == (value, value)


def test_numpys_bfloat16_is_torchs():
    samples = loaded(np.array([[1.5], [-2.0]], bfloat16()), np.array([True, False]))
    assert samples.inputs.dtype == torch.bfloat16
    assert samples.inputs.float().tolist() == [[1.5], [-2.0]]
    assert samples.targets.dtype == torch.bool


@pytest.mark.parametrize("dtype", ["c8", "O", "M8[s]", "U3"])
def test_what_is_no_real_number_is_refused_by_name(dtype):
    with pytest.raises(
        TaskError, match=r"train_data's inputs are .* and not numbers \(real ones, integers or booleans\)"
    ):
        loaded(np.zeros((2, 1), dtype), np.zeros(2))


def test_tuples_and_dicts_of_arrays_become_structures_of_tensors():
    inputs = {"table": np.ones((3, 2)), "images": (np.zeros((3, 4, 4), np.uint8), torch.ones(3, dtype=torch.float64))}
    samples = loaded(inputs, (np.arange(3), [0.5, 1.5, 2.5]))
    assert len(samples) == 3
    assert (samples.inputs["table"].dtype, samples.inputs["images"][0].dtype) == (torch.float32, torch.uint8)
    assert isinstance(samples.inputs["images"], tuple)
    assert samples.targets[1].tolist() == [0.5, 1.5, 2.5]
    assert [chunk.targets[0].tolist() for chunk in samples.chunks(2)] == [[0, 1], [2]]
    last = samples.chosen(torch.tensor([2, 0]))
    assert (last.targets[0].tolist(), last.inputs["table"].shape) == ([2, 0], (2, 2))
    assert samples.device.type == computing_device().type


@pytest.mark.parametrize("value", [(1, 2), ((1, 2), (3, 4)), (np.float32(1), np.float32(2)), [np.ones(3), np.ones(3)]])
def test_numbers_in_tuples_and_arrays_in_lists_are_one_array(value):
    assert isinstance(loaded(value, (0, 1)).inputs, torch.Tensor)


@pytest.mark.parametrize(
    ("inputs", "targets", "said"),
    [
        (
            {"a": np.ones((3, 2)), "b": np.ones((4, 2))},
            np.ones(3),
            r"returned a float32 \(3, 2\), b float32 \(4, 2\); ",
        ),
        (
            (np.ones((3, 2)), np.ones(3)),
            np.ones(2),
            r"3 inputs but 2 targets: input_0 float32 \(3, 2\), input_1 float32 \(3,\); targ",
        ),
        ({"a": {}}, np.ones(3), r"inputs\['a'\] are an empty dict, without any tensor"),
        (({"a": np.float32(1)},), np.ones(1), r"inputs are a single number \(input_0\.a float32 \(\)\)"),
        ({"words": np.array(["x", "y"])}, np.ones(2), r"inputs\['words'\] are <U1 and not numbers"),
    ],
)
def test_structures_that_cannot_be_samples_are_refused_by_name(inputs, targets, said):
    with pytest.raises(TaskError, match=said):
        loaded(inputs, targets)
