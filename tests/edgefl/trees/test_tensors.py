"""Tensors as arrays and back, the same bits of each dtype that travels."""

import numpy as np
import pytest
import torch

from edgefl.trees import bfloat16
from edgefl.trees.tensors import array_of, tensor_of

DTYPES = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "bfloat16",
          "float32", "float64"]  # fmt: skip


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,), (2, 3)])
@pytest.mark.parametrize("name", DTYPES)
def test_there_and_back(name, shape):
    dtype = getattr(torch, name)
    tensor = torch.arange(int(np.prod(shape))).reshape(shape).to(dtype)
    array = array_of(tensor)
    assert (array.dtype.name, array.shape) == (name, shape)
    again = tensor_of(array)
    assert (again.dtype, again.shape) == (dtype, tensor.shape)
    assert torch.equal(again, tensor)


def test_what_needs_a_gradient_is_read_and_what_is_strided_keeps_its_order():
    tensor = torch.nn.Parameter(torch.arange(6, dtype=torch.bfloat16).view(2, 3).t())
    np.testing.assert_array_equal(array_of(tensor).astype(float), [[0, 3], [1, 4], [2, 5]])


def test_the_bits_of_a_bfloat16_are_those_of_numpys():
    values = [1.0, -2.5, 3.140625, float("inf"), 1e-40]
    np.testing.assert_array_equal(array_of(torch.tensor(values, dtype=torch.bfloat16)), np.array(values, bfloat16()))


def test_what_numpy_lacks_is_a_type_error():
    with pytest.raises(TypeError):
        array_of(torch.zeros(2).to(torch.float8_e4m3fn))
