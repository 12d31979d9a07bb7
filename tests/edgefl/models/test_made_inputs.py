"""Inputs in batches, and inputs from types and shapes."""

from itertools import islice

import numpy as np

from edgefl.models.made_inputs import candidates, in_batches
from edgefl.models.tensors import TensorInfo

X, STATE, RATE = TensorInfo("x", "FP32", (-1, 2)), TensorInfo("s", "FP32", (2, -1)), TensorInfo("r", "INT64", ())


def test_rows_are_along_the_first_free_size_of_each_input():
    inputs = {"x": np.arange(4.0).reshape(2, 2), "s": np.array([[1, 2], [3, 4]]), "r": np.array(7)}
    one, three = in_batches(inputs, [X, STATE, RATE])
    assert (one["x"].tolist(), one["s"].tolist(), one["r"]) == ([[0, 1]], [[1], [3]], 7)
    assert (three["x"].tolist(), three["s"].tolist()) == ([[0, 1], [2, 3], [0, 1]], [[1, 2, 1], [3, 4, 3]])


def test_inputs_without_a_common_number_of_rows_have_no_batches():
    assert in_batches({"x": np.zeros((2, 2)), "s": np.zeros((2, 3))}, [X, STATE]) == []
    assert in_batches({"x": np.zeros((0, 2))}, [X]) == []
    assert in_batches({"r": np.array(1)}, [RATE]) == []


def test_made_inputs_have_one_row_a_common_size_and_the_declared_types():
    infos = [TensorInfo("x", "FP16", (-1, 3, -1, -1)), TensorInfo("i", "INT32", (-1,)), TensorInfo("b", "BOOL", (4,))]
    first, second = islice(candidates(infos), 2)
    assert [one["x"].shape for one in (first, second)] == [(1, 3, 16, 16), (1, 3, 32, 32)]
    assert (first["x"].dtype, first["i"].tolist(), first["b"].tolist()) == (np.float16, [1], [True] * 4)
    assert 0 <= first["x"].min() < first["x"].max() <= 1
    assert np.array_equal(first["x"], next(candidates(infos))["x"])


def test_integers_are_1_or_else_0_and_without_free_sizes_there_is_no_more_to_try():
    assert [one["r"].item() for one in candidates([RATE])] == [1, 0]
    assert len(list(candidates([TensorInfo("x", "FP32", (1, 2))]))) == 1


def test_no_input_is_made_that_is_too_large():
    cube = TensorInfo("x", "FP32", (-1, -1, -1, -1))
    assert max(one["x"].size for one in candidates([cube])) <= 4 << 20
