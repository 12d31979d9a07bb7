"""Requests and their parts."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from cloud.stages.work import RequestRefused, StageRequest


@pytest.fixture
def request_of():
    loop = asyncio.new_event_loop()
    yield lambda array: StageRequest("a", {"x": array}, 0.0, settled=loop.create_future())
    loop.close()


def result(array):
    return [("y", "FP32", array.shape, array.tobytes())]


def test_a_request_is_divided_and_joined_in_its_order(request_of) -> None:
    array = np.arange(10, dtype=np.float32).reshape(5, 2)
    request = request_of(array)
    request.divide(2, merges=True)
    assert [(part.rows, part.cost) for part in request.parts] == [(2, 16), (2, 16), (1, 8)]
    for part in reversed(request.parts):
        assert not request.is_over
        request.take_result(part, result(part.tensors["x"] * 2))
    ((name, datatype, shape, raw),) = request.settled.result()
    assert (name, datatype, shape) == ("y", "FP32", (5, 2))
    assert raw == (array * 2).tobytes()


@pytest.mark.parametrize(("rows", "merges", "alone"), [(5, False, True), (2, True, False), (0, True, True)])
def test_a_request_of_one_part(request_of, rows, merges, alone) -> None:
    request = request_of(np.zeros((rows, 2), np.float32))
    request.divide(2, merges=merges)
    (part,) = request.parts
    assert part.alone == alone
    assert part.tensors["x"].shape == (rows, 2)


def test_it_is_settled_once(request_of) -> None:
    request = request_of(np.zeros((2, 1), np.float32))
    request.divide(1, merges=True)
    request.refuse("UNAVAILABLE", "lost")
    request.refuse("INTERNAL", "again")
    for part in request.parts:
        request.take_result(part, result(part.tensors["x"]))
    with pytest.raises(RequestRefused, match="lost") as refused:
        request.settled.result()
    assert refused.value.status == "UNAVAILABLE"


def test_only_the_same_shapes_and_types_are_rows_of_one_batch(request_of) -> None:
    def key(array):
        request = request_of(array)
        request.divide(8, merges=True)
        return request.parts[0].key

    same = key(np.zeros((2, 3), np.float32))
    assert key(np.zeros((1, 3), np.float32)) == same
    assert key(np.zeros((2, 4), np.float32)) != same
    assert key(np.zeros((2, 3), np.float64)) != same
