"""Tensors as the Open Inference Protocol names them."""

from types import SimpleNamespace

import pytest

from edgefl.errors import ProtocolError
from edgefl.models.tensors import TensorInfo, described, listed


def node(kind, shape):
    return SimpleNamespace(name="x", type=kind, shape=shape)


def test_a_free_size_is_minus_one_whatever_it_is_called():
    [info] = described("m", [node("tensor(float16)", ["batch", None, 0, 3])])
    assert info == TensorInfo("x", "FP16", (-1, -1, -1, 3))
    assert (info.type_text, str(info)) == ("FP16[-1,-1,-1,3]", "x FP16[-1,-1,-1,3]")
    assert info.as_json() == {"name": "x", "datatype": "FP16", "shape": [-1, -1, -1, 3]}


def test_shapes_that_fit():
    info = TensorInfo("x", "FP32", (-1, 3))
    assert [info.fits(shape) for shape in ((0, 3), (5, 3), (5, 4), (3,), ())] == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("seq(map(int64,tensor(float)))", "zipmap"),
        ("map(string,tensor(float))", "returns a tensor"),
        ("seq(tensor(float))", "ConcatFromSequence"),
        ("optional(tensor(float))", "plain input or output"),
        ("tensor(string)", "indices of classes"),
        ("tensor(bfloat16)", "cast it to float32"),
        ("sparse_tensor(float)", "expected: BOOL"),
    ],
)
def test_a_type_that_is_not_served_is_refused_with_what_to_do(kind, remedy):
    with pytest.raises(ProtocolError, match=r"m has 'x' of type .*") as caught:
        described("m", [node(kind, [1])])
    assert remedy in str(caught.value)


def test_tensors_are_listed_for_people():
    assert listed([TensorInfo("x", "FP32", (3,)), TensorInfo("y", "BOOL", ())]) == "x FP32[3], y BOOL[]"
    assert listed([]) == "none"


def test_a_text_is_read_back_and_others_are_refused() -> None:
    for info in (TensorInfo("x", "FP32", (-1, 3)), TensorInfo("n", "INT64", ()), TensorInfo("b", "BOOL", (0,))):
        assert TensorInfo.parsed(info.name, info.type_text) == info
    for wrong in ("", "FP32", "FP32[", "FP32[a]", "FP32[-2]", "TEXT[1]", "FP32[1]x"):
        with pytest.raises(ProtocolError, match="expected a text such as"):
            TensorInfo.parsed("x", wrong)
