"""Numbers between JSON and numpy, in blocks and at once."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edge_agent.serving import json_numbers
from edge_agent.serving.json_numbers import read_numbers, write_numbers
from edge_agent.serving.json_request import UnparsedArray
from edgefl.errors import ProtocolError


def cut(text: str) -> UnparsedArray:
    return UnparsedArray(memoryview(text.encode()))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(json_numbers, "BLOCK_BYTES", 16)
    monkeypatch.setattr(json_numbers, "BLOCK_VALUES", 3)


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (50,), (9, 2), (4, 3, 2), (2, 2, 2, 5)])
@pytest.mark.parametrize("separator", [",", " ,\n "])
def test_blocks_give_what_one_piece_gives(shape, separator):
    values = np.arange(np.prod(shape), dtype="<i4").reshape(shape)
    text = json.dumps(values.tolist(), separators=(separator, ":"))
    assert read_numbers(cut(text), "<i4").tolist() == values.reshape(-1).tolist()
    assert read_numbers(values.tolist(), "<i4").tolist() == values.reshape(-1).tolist()


@pytest.mark.parametrize(
    "text",
    [
        "[1,2,3,4,5,6,7,8,9,10,]",
        "[,1,2,3,4,5,6,7,8,9,10]",
        "[1,2,3,4,5,6,7,8,,9,10]",
        "[1,2,3,4,5,6,7,8] [9]",
        "[1 2 3 4 5 6 7 8 9]",
        "[[1,2],[3,4],[5,6],[7,8],[9]]",
        "[[1,2],[3,4],[5,6],[7,8],9]",
        "[[1,2],[3,4],[5,6]],[7,8]",
        "[[1,2],[3,4],[5,6],[[7,8]]]",
        "[[1,2,3,4,5,6,7,8,9]",
        "[1,2,3,4,5,6,7,8,9]]",
        "[1,2,3,4,5,6,7,8,NaN]",
        "[1,2,3,4,5,6,7,8,null]",
        "[1,2,3,4,5,6,7,8,1.5]",
        "[1,2,3,4,5,6,7,8,4294967296]",
        "[[[[[1,2,3,4,5,6,7,8,9]]]]",
    ],
)
def test_what_is_wrong_anywhere_is_refused(text):
    with pytest.raises(ProtocolError):
        read_numbers(cut(text), "<i4")


@pytest.mark.parametrize("values", [[], [1], [1, 2, 3], [1, 2, 3, 4], [1.5, float("inf"), 0.1, float("nan"), 2]])
def test_written_in_blocks_and_read_strictly(values):
    text = "[" + "".join(write_numbers(np.array(values, np.float64))) + "]"
    read = json.loads(text, parse_constant=pytest.fail)
    assert read == [value if np.isfinite(value) else None for value in values]


@pytest.mark.parametrize("datatype", ["?", "<u8", "<i8"])
def test_integers_are_written_exactly(datatype):
    values = np.array([np.iinfo(datatype).max, 1] if datatype != "?" else [True, False], datatype)
    assert json.loads("[" + "".join(write_numbers(values)) + "]") == values.tolist()
