"""Tensors of the Open Inference Protocol: by hand, both ways, and against hostile messages."""

from __future__ import annotations

import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgefl.errors import ProtocolError
from edgefl.models.tensors import NUMPY_TYPES, TensorInfo
from edgefl.protocols.inference import open_inference_grpc_pb2 as pb
from edgefl.protocols.inference.tensors import (
    DATATYPES,
    check_fits,
    datatype_of,
    decode_contents,
    decode_raw,
    dtype_of,
    encode_raw,
    make_request,
    refuse_nan,
    request_tensors,
    response_tensors,
)

NUMBERS = st.sampled_from([np.dtype(name) for name in NUMPY_TYPES.values()])


def sent(request):
    """Return a request as a server receives it."""
    return pb.ModelInferRequest.FromString(request.SerializeToString())


def raw_input(raw, datatype="FP32", shape=(2,), name="x"):
    request = pb.ModelInferRequest(model_name="m", raw_input_contents=[raw])
    request.inputs.add(name=name, datatype=datatype, shape=shape)
    return sent(request)


def test_raw_bytes_by_hand() -> None:
    assert decode_raw("x", "FP32", [2], struct.pack("<2f", 1.5, -2)).tolist() == [1.5, -2]
    assert decode_raw("x", "BYTES", [2], b"\x02\0\0\0ab\0\0\0\0").tolist() == [b"ab", b""]
    assert encode_raw(np.array([b"ab", b""], object)) == b"\x02\0\0\0ab\0\0\0\0"
    assert encode_raw(np.array([258], ">u2")) == b"\x02\x01"
    assert decode_raw("x", "BF16", [1], b"\x80\x3f").astype(np.float32).tolist() == [1.0]  # 0x3f80


@settings(deadline=None)
@given(NUMBERS.flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0))))
def test_an_array_of_numbers_arrives_bit_for_bit(array) -> None:
    arrived = request_tensors(sent(make_request("m", {"x": array})))["x"]
    assert (arrived.dtype, arrived.shape, arrived.tobytes()) == (array.dtype, array.shape, array.tobytes())


@settings(deadline=None)
@given(st.lists(st.binary(max_size=9), max_size=6))
def test_a_bytes_tensor_arrives(texts) -> None:
    array = np.empty(len(texts), object)
    array[:] = texts
    assert request_tensors(sent(make_request("m", {"x": array})))["x"].tolist() == texts


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_arrives(dtype) -> None:
    array = np.array([[0.5, -2], [7, np.inf]], dtype)
    arrived = request_tensors(sent(make_request("m", {"x": array})))["x"]
    assert arrived.dtype == dtype
    assert arrived.tobytes() == array.tobytes()


def test_every_datatype_has_a_numpy_type_and_back() -> None:
    assert [datatype_of(dtype_of(one)) for one in DATATYPES] == list(DATATYPES)
    with pytest.raises(ProtocolError, match="datatype 'FP8' is unknown; expected one of: BOOL, "):
        dtype_of("FP8")
    with pytest.raises(ProtocolError, match="arrays of complex64 cannot be sent"):
        datatype_of(np.dtype(np.complex64))


@pytest.mark.parametrize(
    ("datatype", "field", "values"),
    [
        ("BOOL", "bool_contents", [True, False]), ("INT8", "int_contents", [-128, 127]),
        ("INT64", "int64_contents", [-1, 1 << 62]), ("UINT16", "uint_contents", [0, 65535]),
        ("UINT64", "uint64_contents", [0, (1 << 64) - 1]), ("FP32", "fp32_contents", [0.5, -1.0]),
        ("FP64", "fp64_contents", [1e300, 0.0]), ("BYTES", "bytes_contents", [b"a", b""]),
    ],
)  # fmt: skip
def test_typed_contents_by_hand(datatype, field, values) -> None:
    array = decode_contents("x", datatype, [2, 1], pb.InferTensorContents(**{field: values}))
    assert array.tolist() == [[value] for value in values]
    assert array.dtype == dtype_of(datatype)


@pytest.mark.parametrize(
    ("datatype", "contents", "words"),
    [
        ("FP16", {}, "has datatype FP16, which has no typed form; send raw_input_contents"),
        ("INT8", {"int_contents": [128, 0]}, "has values outside -128..127, the range of INT8"),
        ("FP32", {"fp32_contents": [1]}, r"has 1 values in fp32_contents; shape \[2\] has 2"),
        ("FP32", {"fp32_contents": [1, 2], "fp64_contents": [1]}, "has values in fp64_contents; those of FP32 belong"),
        ("TEXT", {}, "datatype 'TEXT' is unknown"),
    ],
)
def test_typed_contents_that_are_refused(datatype, contents, words) -> None:
    with pytest.raises(ProtocolError, match=words):
        decode_contents("x", datatype, [2], pb.InferTensorContents(**contents))


@pytest.mark.parametrize(
    ("raw", "datatype", "shape", "words"),
    [
        (b"1234", "FP32", (2,), r"input 'x' has 4 bytes of data; shape \[2\] of FP32 has 8"),
        (b"", "FP32", (1 << 40, 1 << 40), "expected sizes of 0 or more, and at most"),
        (b"", "FP32", (0, 1 << 62), "expected sizes of 0 or more"),
        (b"", "FP32", (-1,), r"input 'x' has shape \[-1\]"),
        (b"", "FP32", (1,) * 33, "has 33 dimensions; expected at most 32"),
        (b"\x02", "BOOL", (1,), "contains bytes other than 0 and 1"),
        (b"\xff\xff\xff\xff", "BYTES", (1,), "ends within its element 0"),
        (b"", "BYTES", (1 << 27,), "elements of BYTES have at least"),
        (b"\0\0\0\0\0", "BYTES", (1,), "has 1 bytes of data after its 1 elements"),
        (b"\0", "NOTHING", (1,), "datatype 'NOTHING' is unknown"),
    ],
)
def test_raw_contents_that_are_refused(raw, datatype, shape, words) -> None:
    with pytest.raises(ProtocolError, match=words):
        request_tensors(raw_input(raw, datatype, shape))


@settings(deadline=None)
@given(st.binary(max_size=40), st.sampled_from(DATATYPES), st.lists(st.integers(-2, 1 << 62), max_size=3))
def test_any_bytes_are_an_array_or_a_protocol_error(raw, datatype, shape) -> None:
    try:
        array = request_tensors(raw_input(raw, datatype, shape))["x"]
    except ProtocolError:
        return
    assert array.shape == tuple(shape)


def test_messages_that_contradict_themselves() -> None:
    request = make_request("m", {"x": np.zeros(1, np.float32), "y": np.zeros(1, np.float32)})
    request.raw_input_contents.pop()
    with pytest.raises(ProtocolError, match="has 2 inputs, and raw contents of 1; expected the same"):
        request_tensors(sent(request))
    request = make_request("m", {"x": np.zeros(1, np.float32)})
    request.inputs[0].contents.fp32_contents.append(1)
    with pytest.raises(ProtocolError, match="has typed contents, and the message has raw contents"):
        request_tensors(sent(request))
    request = make_request("m", {"x": np.zeros(1, np.float32), "y": np.zeros(1, np.float32)})
    request.inputs[1].name = "x"
    with pytest.raises(ProtocolError, match="input 'x' is given twice"):
        request_tensors(sent(request))
    request = make_request("m", {"x": np.zeros(1, np.float32)})
    request.inputs[0].parameters["shared_memory_region"].string_param = "/x"
    with pytest.raises(ProtocolError, match="names a shared memory region"):
        request_tensors(sent(request))
    with pytest.raises(ProtocolError, match="needs a name of 1 to 1024 characters"):
        request_tensors(raw_input(b"", shape=(0,), name=""))
    request = pb.ModelInferRequest(inputs=[{"name": str(number)} for number in range(257)])
    with pytest.raises(ProtocolError, match="has 257 inputs; expected at most 256"):
        request_tensors(request)


def test_outputs_of_a_response() -> None:
    response = pb.ModelInferResponse(outputs=[{"name": "y", "datatype": "UINT8", "shape": [3]}])
    response.raw_output_contents.append(b"\1\2\3")
    assert response_tensors(response)["y"].tolist() == [1, 2, 3]


def test_what_does_not_fit_a_model() -> None:
    infos = [TensorInfo("x", "FP32", (-1, 2)), TensorInfo("n", "INT64", (1,))]
    fitting = {"x": np.zeros((5, 2), np.float32), "n": np.zeros(1, np.int64)}
    check_fits("model m", infos, fitting)
    for change, words in (
        ({"z": fitting["x"]}, "input 'z' is unknown; model m takes: x, n"),
        ({"x": np.zeros((5, 3), np.float32)}, r"has shape \[5, 3\]; model m takes \[-1, 2\]"),
        ({"x": np.zeros((5, 2))}, "has datatype FP64; model m takes FP32"),
    ):
        with pytest.raises(ProtocolError, match=words):
            check_fits("model m", infos, fitting | change)
    with pytest.raises(ProtocolError, match="inputs are missing: n; model m takes: x, n"):
        check_fits("model m", infos, {"x": fitting["x"]})


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_nan_is_refused_and_infinity_is_not(dtype) -> None:
    refuse_nan({"x": np.array([1, -np.inf], dtype), "n": np.array([1]), "s": np.array([b"a"], object)})
    with pytest.raises(ProtocolError, match="input 'y' has 2 NaN among its 3 values"):
        refuse_nan({"x": np.zeros(2, dtype), "y": np.array([np.nan, 1, np.nan], dtype)})
