"""Messages between the server and a tail's process."""

from __future__ import annotations

import dataclasses

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


@pytest.mark.parametrize(
    "message",
    [
        TailUp(pid=4),
        TailNotLoaded(error="no"),
        RunStep(step=1, items=[dataclasses.asdict(ITEM)], drop=[9]),
        StepDone(step=1, tokens=[None, 5], errors=["", "x"], lacks_memory=True, seconds=0.5),
    ],
)
def test_a_message_is_read_as_it_was_written(message) -> None:
    data = packed(message, b"body")
    header, body = sizes_of(data[: HEAD.size])
    assert body == 4
    assert parse_header(data[HEAD.size : HEAD.size + header]) == message
    assert data[HEAD.size + header :] == b"body"


def test_items_are_records_again() -> None:
    assert RunStep(step=1, items=[dataclasses.asdict(ITEM)], drop=[]).parsed() == [ITEM]


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"kind":"what"}', b'{"kind":"up"}', b"[" * 100_000])
def test_anything_else_is_refused(data) -> None:
    with pytest.raises(ProtocolError, match="not a message between server and tail"):
        parse_header(data)


def test_sizes_are_bounded() -> None:
    with pytest.raises(ProtocolError, match="has a header of 4294967295"):
        sizes_of(b"\xff" * 8)
