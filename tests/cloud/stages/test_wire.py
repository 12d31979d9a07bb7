"""Messages between the stage server and a stage's process."""

from __future__ import annotations

import pytest

from cloud.stages.slots import Placed
from cloud.stages.wire import (
    BatchDone,
    BatchFailed,
    RunBatch,
    StageFailed,
    StageUp,
    described_places,
    packet,
    parse_packet,
)
from edgefl.errors import ProtocolError


@pytest.mark.parametrize(
    "message",
    [
        StageUp(inputs=[["x", "FP32", [-1]]], outputs=[], unmerged=""),
        StageFailed(error="no"),
        RunBatch(batch=1, tensors={"x": ["FP32", [1, 2], 64]}, free=128, end=256),
        BatchDone(batch=1, tensors={}, free=3),
        BatchFailed(batch=1, error="no", memory=True),
    ],
)
def test_a_message_arrives_as_it_was_sent(message) -> None:
    assert parse_packet(packet(message)) == message


def test_places_survive() -> None:
    places = {"x": Placed("FP32", (1, 2), 64)}
    sent = RunBatch(batch=1, tensors=described_places(places), free=0, end=0)
    arrived = parse_packet(packet(sent))
    assert isinstance(arrived, RunBatch)
    assert arrived.placed() == places


@pytest.mark.parametrize("data", [b"", b"[]", b'{"kind":"other"}', b'{"kind":"done"}', b"\xff", b"[" * 100_000])
def test_anything_else_is_refused(data) -> None:
    with pytest.raises(ProtocolError, match="not a message between server and stage"):
        parse_packet(data)
