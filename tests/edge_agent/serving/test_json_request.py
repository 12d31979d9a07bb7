"""A request's JSON, strict, small or large."""

from __future__ import annotations

import json
import random

import pytest

from edge_agent.serving.json_request import SMALL_BYTES, UnparsedArray, parse_array, parse_object
from edgefl.errors import ProtocolError

LONG = list(range(SMALL_BYTES // 4))


def parse(text: str | bytes) -> dict:
    return parse_object(memoryview(text.encode() if isinstance(text, str) else text))


def test_a_small_request_is_plain_json():
    assert parse('{"a": [1, {"data": [2]}]}') == {"a": [1, {"data": [2]}]}


def test_long_arrays_are_cut_out_in_their_order():
    text = json.dumps({"inputs": [{"name": "a", "data": LONG, "x": 1}, {"data": [[1], [2]]}], "id": '"data":[1'})
    head = parse(text)
    first, second = (one["data"] for one in head["inputs"])
    assert json.loads(bytes(first.text)) == LONG
    assert json.loads(bytes(second.text)) == [[1], [2]]
    assert head["id"] == '"data":[1'
    assert head["inputs"][0]["x"] == 1


@pytest.mark.parametrize("data", ["[]", "[ ]", "[[]]", '["text"]', "7", "null", "[true, false]", '[{"a": 1}]'])
def test_other_data_in_a_large_request(data):
    value = parse(f'{{"pad": "{"x" * SMALL_BYTES}", "data" : {data}, "after": [1]}}')
    got = value["data"]
    assert (json.loads(bytes(got.text)) if isinstance(got, UnparsedArray) else got) == json.loads(data)
    assert value["after"] == [1]


@pytest.mark.parametrize(
    "text",
    [
        '{"data": [1, 2',
        '{"data": [1, 2}',
        '{"data": [1, 2]]}',
        '{"data": [1, NaN], "b": NaN}',
        '{"a": NaN, "data": [1]}',
        '{"a": Infinity, "data": [1]}',
        '{"data": [1], "data": [2]}',
        '{"data": [1] "b": 2}',
        '{"data": [1]',
        '{"data": NaN}',
        "[1]",
        '"\\ud83d',
        "",
    ],
)
def test_what_is_not_json_is_refused_small_and_large(text):
    def read_all(padding: str) -> None:
        for value in parse(text + padding).values():  # what was cut out is read when its tensor is
            parse_array(bytes(value.text))

    with pytest.raises(ProtocolError):
        read_all("")
    with pytest.raises(ProtocolError):
        read_all(" " * SMALL_BYTES)


def test_json_beside_the_tensors_is_bounded():
    with pytest.raises(ProtocolError, match="bytes of JSON besides its tensors' data"):
        parse(json.dumps({"id": "x" * (2 << 20)}))


def test_bytes_that_are_no_text():
    with pytest.raises(ProtocolError, match="not JSON"):
        parse(b"\xff\xfe{")


@pytest.mark.parametrize("text", [b"[NaN]", b"[1,]", b"7", b"[" * 100_000, b"[1" + b"0" * 5000 + b"]"])
def test_an_array_is_strict_too(text):
    with pytest.raises(ProtocolError):
        parse_array(text)


def test_numbers_are_read_to_the_same_bit_by_either_parser(monkeypatch):
    text = json.dumps([random.Random(1).uniform(-1, 1) * 10.0**power for power in range(-300, 300)]).encode()
    quick = parse_array(text)
    monkeypatch.setattr("edge_agent.serving.json_request._parse_fast", lambda _text: None)
    assert quick == parse_array(text) == json.loads(text)
