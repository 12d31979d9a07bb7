"""The Open Inference Protocol's bodies, without a server."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edge_agent.serving.inference import HEADER_LENGTH, InferenceRequest, encode_response, parse_request
from edge_agent.sessions import NUMPY_TYPES, LoadedModel, TensorInfo
from edgefl.errors import ProtocolError

Y = TensorInfo("y", "FP32", (-1, 2))


def served(*inputs: TensorInfo, outputs=(Y,)) -> LoadedModel:
    return LoadedModel("m", 7, inputs or (TensorInfo("x", "FP32", (-1, 2)),), outputs, inline=True, session=None)


def tensor(data=None, name="x", shape=(1, 2), datatype="FP32", **parameters) -> dict:
    facts = {"name": name, "shape": list(shape), "datatype": datatype}
    if data is not None:
        facts["data"] = data
    if parameters:
        facts["parameters"] = parameters
    return facts


def body(*tensors, **more) -> bytes:
    return json.dumps({"inputs": list(tensors), **more}).encode()


@pytest.mark.parametrize("data", [[1, 2.5], [[1, 2.5]]])
def test_json_flat_or_nested(data):
    request = parse_request(served(), body(tensor(data), id="a7"), None)
    assert request.id == "a7"
    assert request.feeds["x"].dtype == np.float32
    assert request.feeds["x"].tolist() == [[1.0, 2.5]]
    assert request.outputs == {"y": False}


@pytest.mark.parametrize("datatype", NUMPY_TYPES)
def test_every_datatype_in_json_and_in_binary(datatype):
    model = served(TensorInfo("x", datatype, (-1, 2)))
    values = np.array([[1, 0], [0, 1]], NUMPY_TYPES[datatype])
    plain = parse_request(model, body(tensor(values.tolist(), shape=(2, 2), datatype=datatype)), None)
    head = body(tensor(shape=(2, 2), datatype=datatype, binary_data_size=values.nbytes))
    binary = parse_request(model, head + values.tobytes(), str(len(head)))
    for request in (plain, binary):
        assert request.feeds["x"].dtype == values.dtype
        assert np.array_equal(request.feeds["x"], values)


def test_several_binary_inputs_follow_in_order():
    model = served(TensorInfo("a", "FP32", (2,)), TensorInfo("b", "INT8", (3,)), TensorInfo("c", "FP32", (1,)))
    head = body(
        tensor(name="b", shape=(3,), datatype="INT8", binary_data_size=3),
        tensor([5.0], name="c", shape=(1,)),
        tensor(name="a", shape=(2,), binary_data_size=8),
    )
    data = np.array([1, 2, 3], np.int8).tobytes() + np.array([4, 5], np.float32).tobytes()
    feeds = parse_request(model, head + data, str(len(head))).feeds
    assert {name: value.tolist() for name, value in feeds.items()} == {"a": [4, 5], "b": [1, 2, 3], "c": [5]}


def test_an_empty_batch():
    assert parse_request(served(), body(tensor([], shape=(0, 2))), None).feeds["x"].shape == (0, 2)


@pytest.mark.parametrize(
    ("data", "length", "said"),
    [
        (b"", None, "not JSON"),
        (b"[]", None, "a JSON list, not an object"),
        (b'{"inputs": 3}', None, "'inputs' must be a list of objects"),
        (body(), None, "inputs missing: x"),
        (body(tensor([1, 2]), tensor([1, 2])), None, "input 'x' is given twice"),
        (body(tensor([1, 2], name="z")), None, "input 'z' is unknown; model m takes: x"),
        (body(tensor([1, 2], datatype="FP64")), None, "has datatype FP64, the model takes FP32"),
        (body(tensor(["a", "b"], datatype="BYTES")), None, "BYTES tensors are not served"),
        (body(tensor([1, 2, 3], shape=(1, 3))), None, r"has shape \[1, 3\], the model takes \[-1, 2\]"),
        (body(tensor([1, 2], shape=(2,))), None, r"has shape \[2\], the model takes"),
        (body(tensor([1, 2], shape=(-1, 2))), None, "which is not a list of sizes"),
        (body({**tensor([1, 2]), "shape": None}), None, "which is not a list of sizes"),
        (body(tensor([1, 2, 3])), None, r"has 3 values of data; shape \[1, 2\] has 2"),
        (body(tensor(["1", "2"])), None, "holds str"),
        (body(tensor([[1], [2, 3]])), None, "cannot be read as FP32"),
        (body(tensor()), None, "input 'x' cannot be read as FP32: it has no data"),
        (body(tensor([None, 2])), None, "it holds null"),
        (body(tensor([[1, 2], 3])), None, "its rows differ in length"),
        (body(tensor([1e39, 2])), None, "holds values outside"),
        (body(tensor([10**400, 2])), None, "holds values outside"),
        (body(tensor([float("nan"), 2])), None, "the request contains NaN, which is not JSON"),
        (body(tensor([1, float("-inf")])), None, "the request contains -Infinity, which is not JSON"),
        (b"[" * 100_000, None, "nested too deeply"),
        (b'{"a":' * 100_000, None, "nested too deeply"),
        (b'{"inputs": [], "inputs": []}', None, "has the key 'inputs' twice"),
        (body(tensor([1, 2], name=[])), None, r"input \[\] is unknown"),
        (body(tensor([1, 2], name="\ud800")), None, "is unknown"),
        (body(tensor([1, 2], datatype=[])), None, r"has datatype \[\], the model takes"),
        (body(tensor([1, 2], shape=(10**4000, 2))), None, "values of data|more than"),
        (body(tensor([1, 2], shape=(10**9, 2))), None, "more than 16777216 elements"),
        (body(tensor(shape=(1, 2), binary_data_size=True)), None, "declares True bytes"),
        (body(tensor([1, 2], binary_data_size=0)), None, "send one"),
        (body(tensor([1, 2]), outputs=[{"name": []}]), None, r"output \[\] is unknown"),
        (body(tensor([1, 2]), outputs=[{"name": "y"}, {"name": "y"}]), None, "output 'y' is requested twice"),
        (
            body(tensor([1, 2]), outputs=[{"name": "y", "parameters": {"binary_data": 1}}]),
            None,
            "expected true or false",
        ),
        (body(tensor([1, 2]), id=7), None, "'id' is 7; expected a string"),
        (body(tensor([1, 2]), id="\ud800"), None, "expected a string"),
        (body(tensor([1, 2])), "9" * 5000, "Inference-Header-Content-Length is '999"),
        (body(tensor([1, 2])), "\u0663", "Inference-Header-Content-Length is"),
        (body(tensor(binary_data_size=8)) + b"1234", str(len(body(tensor(binary_data_size=8)))), "4 are left"),
        (body(tensor(binary_data_size=4)) + b"1234", str(len(body(tensor(binary_data_size=4)))), "has 4 bytes of data"),
        (body(tensor(binary_data_size="8")), None, "declares '8' bytes"),
        (body(tensor([1, 2])) + b"1234", str(len(body(tensor([1, 2])))), "4 bytes more than its inputs declare"),
        (body(tensor([1, 2])), "900", "Inference-Header-Content-Length is '900'"),
        (body(tensor([1, 2])), "-1", "Inference-Header-Content-Length is '-1'"),
        (body(tensor([1, 2]), outputs=[{"name": "q"}]), None, "output 'q' is unknown; model m has: y"),
        (body(tensor([1, 2]), parameters=[]), None, "'parameters' must be an object"),
    ],
)
def test_what_does_not_fit_says_what_was_seen(data, length, said):
    with pytest.raises(ProtocolError, match=said):
        parse_request(served(), data, length)


@pytest.mark.parametrize("values", [[1.5, 2], [300, 1], [-129, 1], [10**30, 1], [10**4000, 1]])
def test_integers_lose_nothing(values):
    model = served(TensorInfo("x", "INT8", (-1, 2)))
    with pytest.raises(ProtocolError, match="input 'x'"):
        parse_request(model, body(tensor(values, datatype="INT8")), None)


@pytest.mark.parametrize(
    ("datatype", "values"),
    [("UINT64", [2**63 + 1, 2**64 - 1]), ("INT64", [-(2**63), 2**63 - 1]), ("UINT64", [0, 2**53 + 1])],
)
def test_integers_of_64_bits_are_exact_both_ways(datatype, values):
    model = served(TensorInfo("x", datatype, (-1, 2)), outputs=(TensorInfo("y", datatype, (-1, 2)),))
    request = parse_request(model, body(tensor(values, datatype=datatype)), None)
    assert request.feeds["x"].tolist() == [values]
    answer = json.loads(encode_response(model, request, [request.feeds["x"]]).body)
    assert answer["outputs"][0]["data"] == values


def test_null_is_as_if_it_were_not_there():
    tensors = {**tensor([1, 2]), "parameters": {"binary_data_size": None}}
    text = json.dumps({"id": None, "parameters": None, "outputs": None, "inputs": [tensors]}).encode()
    request = parse_request(served(), text, None)
    assert (request.id, request.outputs) == ("", {"y": False})
    text = json.dumps({"outputs": [{"name": "y", "parameters": None}], "inputs": [tensors]}).encode()
    assert parse_request(served(), text, None).outputs == {"y": False}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_null_in_json_and_itself_in_binary(value):
    results = [np.array([[value, 1]], np.float32)]
    plain = encode_response(served(), InferenceRequest("", {}, {"y": False}), results)
    assert json.loads(plain.body, parse_constant=pytest.fail)["outputs"][0]["data"] == [None, 1.0]
    binary = encode_response(served(), InferenceRequest("", {}, {"y": True}), results)
    assert binary.body.endswith(results[0].tobytes())


def test_booleans_in_binary_are_zero_or_one():
    model = served(TensorInfo("x", "BOOL", (2,)))
    head = body(tensor(shape=(2,), datatype="BOOL", binary_data_size=2))
    with pytest.raises(ProtocolError, match="bytes other than 0 and 1"):
        parse_request(model, head + b"\x01\x02", str(len(head)))


@pytest.mark.parametrize("rows", [20_000, 200_001])
@pytest.mark.parametrize("nested", [True, False])
def test_a_large_request_is_read_as_a_small_one(rows, nested):
    values = np.arange(2 * rows, dtype=np.float32) / 8
    data = values.reshape(-1, 2).tolist() if nested else values.tolist()
    text = body(tensor(data, shape=(rows, 2)), id="after", outputs=[{"name": "y"}])
    request = parse_request(served(), text, None)
    assert np.array_equal(request.feeds["x"], values.reshape(-1, 2))
    assert request.id == "after"


def test_an_answer_has_a_limit(monkeypatch):
    request = InferenceRequest("", {}, {"y": False})
    results = [np.zeros((4, 2), np.float32)]
    monkeypatch.setattr("edge_agent.serving.inference.MAX_JSON_ELEMENTS", 7)
    with pytest.raises(ProtocolError, match="8 numbers; at most 7 are sent as JSON"):
        encode_response(served(), request, results)
    monkeypatch.setattr("edge_agent.serving.inference.MAX_OUTPUT_BYTES", 31)
    with pytest.raises(ProtocolError, match="32 bytes; at most 31"):
        encode_response(served(), InferenceRequest("", {}, {"y": True}), results)


def test_a_response_in_json():
    request = InferenceRequest("a7", {}, {"y": False})
    response = encode_response(served(), request, [np.array([[1, 2]], np.float32)])
    assert json.loads(response.body) == {
        "model_name": "m",
        "model_version": "7",
        "id": "a7",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}],
    }
    assert response.headers == {"content-type": "application/json"}


def test_a_response_in_binary_and_json_by_turns():
    outputs = (TensorInfo("a", "FP32", (2,)), TensorInfo("b", "INT64", (1,)), TensorInfo("c", "BOOL", (2,)))
    request = InferenceRequest("", {}, {"a": True, "b": False, "c": True})
    results = [np.array([1, 2], np.float32), np.array([9]), np.array([True, False])]
    response = encode_response(served(outputs=outputs), request, results)
    size = int(response.headers[HEADER_LENGTH])
    head = json.loads(response.body[:size])
    assert [one.get("parameters") for one in head["outputs"]] == [
        {"binary_data_size": 8},
        None,
        {"binary_data_size": 2},
    ]
    assert response.body[size:] == results[0].tobytes() + b"\x01\x00"


def test_outputs_are_chosen_and_their_form_too():
    outputs = (TensorInfo("a", "FP32", (2,)), TensorInfo("b", "FP32", (2,)))
    model = served(outputs=outputs)
    every = parse_request(model, body(tensor([1, 2]), parameters={"binary_data_output": True}), None)
    assert every.outputs == {"a": True, "b": True}
    asked = [{"name": "b"}, {"name": "a", "parameters": {"binary_data": True}}]
    some = parse_request(model, body(tensor([1, 2]), outputs=asked), None)
    assert list(some.outputs.items()) == [("b", False), ("a", True)]


def test_a_head_that_was_seen_before_is_read_and_answered_alike():
    model = served()
    head = body(tensor(shape=(1, 2), binary_data_size=8), parameters={"binary_data_output": True})
    answers = []
    for values in ([1, 2], [3, 4], [5, 6]):
        data = np.array([values], np.float32)
        request = parse_request(model, head + data.tobytes(), str(len(head)))
        assert request.feeds["x"].tolist() == [values]
        answers.append(encode_response(model, request, [request.feeds["x"] * 2]))
    assert len(model.cached_headers) == 1
    first, *others = [int(answer.headers[HEADER_LENGTH]) for answer in answers]
    assert others == [first, first]
    assert len({answer.body[:first] for answer in answers}) == 1
    assert [np.frombuffer(answer.body[first:], np.float32).tolist() for answer in answers] == [[2, 4], [6, 8], [10, 12]]
    for wrong in (data.tobytes()[:-1], data.tobytes() + b"x"):
        with pytest.raises(ProtocolError):
            parse_request(model, head + wrong, str(len(head)))
    wider = encode_response(model, request, [np.zeros((3, 2), np.float32)])
    assert b'"shape":[3,2]' in wider.body


def test_only_heads_that_say_all_are_kept_and_not_too_many():
    model = served()
    data = np.zeros((1, 2), np.float32).tobytes()
    for number in range(200):
        head = body(tensor(shape=(1, 2), binary_data_size=8), note=number)
        parse_request(model, head + data, str(len(head)))
    assert 0 < len(model.cached_headers) <= 64
    model.cached_headers.clear()
    head = body(tensor(shape=(1, 2), binary_data_size=8), id="7")
    assert parse_request(model, head + data, str(len(head))).id == "7"
    plain = body(tensor([1, 2]))
    parse_request(model, plain, str(len(plain)))
    assert model.cached_headers == {}
