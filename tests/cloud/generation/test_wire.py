"""Messages between the server and a tail's process."""

from __future__ import annotations

import pytest

from cloud.generation.wire import (
    HEAD,
    RunStep,
    StepDone,
    StepItem,
    TailNotLoaded,
    TailUp,
    packed,
    parse_header,
    sizes_of,
)
from edgefl.errors import ProtocolError

ITEM = StepItem(key=3, num=2, datatype="FP16", position=5, room=9, wants_token=True, temperature=0.5, seed=7)


MESSAGES = [
    TailUp(pid=4),
    TailNotLoaded(error="no"),
    RunStep(step=1, items=[ITEM], drop=[9]),
    StepDone(step=1, tokens=[None, 5], errors=["", "x"], lacks_memory=True, seconds=0.5),
    RunStep(step=2, items=[], drop=[]),
    RunStep(step=3, items=[ITEM, ITEM._replace(key=1 << 60, datatype="BF16", seed=(1 << 63) - 1)], drop=[]),
    StepDone(step=1, tokens=[7], errors=[""]),
]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_read_as_it_was_written(message) -> None:
    data = packed(message, b"body")
    header, body = sizes_of(data[: HEAD.size])
    assert body == 4
    seen = parse_header(data[HEAD.size : HEAD.size + header])
    assert (type(seen), seen) == (type(message), message)
    assert data[HEAD.size + header :] == b"body"


STEP, DONE = (packed(one)[HEAD.size :] for one in MESSAGES[2:4])


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"[]", b"{}", b'{"kind":"what"}', b'{"kind":"up"}', b'{"kind":"up","pid":1,"digest":5}', b"[" * 100_000),
        *(b"R", STEP[:20], STEP[:-1], STEP + b"x", STEP.replace(b"\x02\0\0\0\x01", b"\x02\0\0\0\x07")),  # FP16's number
        *(b"D", DONE[:20], DONE[:-1], DONE + b"x", DONE.replace(b'["", "x"]', b"[]")),
    ],
)
def test_anything_else_is_refused(data) -> None:
    with pytest.raises(ProtocolError, match="not a message between server and tail"):
        parse_header(data)


def test_sizes_are_bounded() -> None:
    with pytest.raises(ProtocolError, match="has a header of 4294967295"):
        sizes_of(b"\xff" * 8)
