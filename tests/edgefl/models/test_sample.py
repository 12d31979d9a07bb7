"""A release's sample: what is written is read, and what differs from it is said."""

import math

import numpy as np
import pytest

from edgefl.errors import ProtocolError
from edgefl.models.sample import (
    Case,
    Sample,
    allowed_difference,
    check_inputs,
    check_sample,
    is_quantised,
    read_sample,
    write_sample,
)
from edgefl.models.tensors import TensorInfo
from edgefl.trees import write_tree
from tests import onnx_models

X = TensorInfo("a/x", "FP32", (-1, 2))
INPUTS = {"a/x": np.ones((1, 2), np.float32)}


def sample_of(output, allowed=1e-3):
    return Sample((Case(INPUTS, {"y": np.asarray(output)}),), {"y": allowed})


def checked(wanted, seen, allowed=1e-3):
    check_sample("m", sample_of(wanted, allowed), lambda _: [np.asarray(seen)], [X], ["y"])


def test_a_sample_is_read_as_it_was_written(tmp_path):
    cases = tuple(Case({"a/x": np.full((n, 2), n, np.float16)}, {"y": np.arange(n)}) for n in (1, 3))
    write_sample(Sample(cases, {"y": math.inf}), tmp_path / "s")
    found = read_sample(tmp_path / "s", "m")
    assert found.allowed == {"y": math.inf}
    for case, wanted in zip(found.cases, cases, strict=True):
        assert case.inputs["a/x"].tolist() == wanted.inputs["a/x"].tolist()
        assert case.inputs["a/x"].dtype == np.float16
        assert case.outputs["y"].tolist() == wanted.outputs["y"].tolist()


@pytest.mark.parametrize(
    "tree",
    [
        None,
        {},
        {"allowed/y": np.array(1.0)},
        {"allowed/y": np.array(np.nan), "0/inputs/x": np.zeros(1)},
        {"x/inputs/x": np.zeros(1)},
        {"0/else/x": np.zeros(1)},
        {"0": np.zeros(1)},
        {"allowed/y": np.zeros(2), "0/inputs/x": np.zeros(1)},
    ],
)
def test_what_is_no_sample_is_refused(tmp_path, tree):
    with (tmp_path / "s").open("wb") as file:
        if tree is None:
            file.write(b"nothing")
        else:
            write_tree(tree, file)
    with pytest.raises(ProtocolError, match="the sample of model m version 1"):
        read_sample(tmp_path / "s", "model m version 1")


def test_a_sample_is_bounded(tmp_path, monkeypatch):
    write_sample(sample_of([1.0]), tmp_path / "s")
    monkeypatch.setattr("edgefl.models.sample.MAX_SAMPLE_BYTES", 100)
    with pytest.raises(ProtocolError, match="bytes, allowed: 100"):
        read_sample(tmp_path / "s", "m")


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, r"it has the inputs none, the model takes a/x FP32\[-1,2\]"),
        ({"b": np.zeros(2)}, "it has the inputs b"),
        ({"a/x": np.zeros((1, 3), np.float32)}, r"input 'a/x' is float32\[1, 3\], the model takes FP32\[-1,2\]"),
        ({"a/x": np.zeros((1, 2))}, r"input 'a/x' is float64\[1, 2\], .* which is numpy's float32"),
    ],
)
def test_inputs_that_do_not_fit_are_told_with_names_and_shapes(inputs, said):
    with pytest.raises(ProtocolError, match=said):
        check_inputs("m.onnx", inputs, [X])


def test_values_within_what_is_allowed_pass():
    checked([1.0, 2.0], [1.0005, 2.0])
    checked([1, 2], [1, 2])
    checked([1.0], [5.0, 6.0], math.inf)
    checked([7] * 200, [7] * 199 + [6], 0.01)


@pytest.mark.parametrize(
    ("wanted", "seen", "said"),
    [
        ([1.0, 2.0], [1.0, 2.1], r"m does not compute here .* output 'y' differs by 0\.1, allowed: 0\.001"),
        ([1.0], [math.nan], "differs by nan"),
        ([1.0], [1.0, 1.0], r"has shape \[2\], expected \[1\]"),
        ([1.0], np.float32([1.0]), r"is float32\[1\], expected float64\[1\]"),
        ([1, 2], [1, 3], "differs in 1 of 2 values"),
        ([True], [False], "differs in 1 of 1 values"),
    ],
)
def test_a_difference_is_told(wanted, seen, said):
    with pytest.raises(ProtocolError, match=said):
        checked(wanted, seen)


def test_other_outputs_are_told():
    with pytest.raises(ProtocolError, match="it has the outputs y, the model returns z"):
        check_sample("m", sample_of([1.0]), lambda _: [np.ones(1)], [X], ["z"])


def test_what_is_allowed_follows_the_type_and_the_largest_value():
    def allowed(datatype, *, quantised=False):
        return allowed_difference(TensorInfo("y", datatype, (-1,)), [np.array([1.0, -20.0])], quantised=quantised)

    found = [allowed(one) for one in ("FP16", "FP32", "FP64", "INT64")]
    assert found == pytest.approx([0.2, 0.02, 0.002, 0.01])
    assert allowed("FP32", quantised=True) == pytest.approx(2.0)


def test_a_model_in_integers_is_known_by_its_operators(tmp_path):
    (tmp_path / "plain").write_bytes(onnx_models.affine())
    (tmp_path / "int8").write_bytes(onnx_models.affine() + b"DequantizeLinear")
    assert not is_quantised(tmp_path / "plain")
    (tmp_path / "int8").write_bytes(b"QuantizeLinear")
    assert is_quantised(tmp_path / "int8")
