"""The trainer's messages."""

from __future__ import annotations

import pytest

from edge_agent.training import trainer_wire as wire
from edgefl.config import TrainConfig
from edgefl.errors import ProtocolError

FIT = wire.FitRequest(
    job="j", round=2, client="cam-1", train=TrainConfig(lr=0.5), model="/m", bundle="/b.zip", task="t:task",
    options={"part": "0"}, out="/o", memory_limit_mb=100,
)  # fmt: skip
DELIVER = wire.DeliverRequest(
    app="app:app", order="/o", envelope="e", bundle="/b.zip", options={}, state="", state_out="/s", out="/r",
    memory_limit_mb=100,
)  # fmt: skip


@pytest.mark.parametrize(
    "message",
    [
        FIT,
        DELIVER,
        wire.Hello(pid=7),
        wire.WorkDone(size=1, blake3="ab", weight=2.0, metrics={"a": 1.0}),
        wire.WorkFailed(reason="é\n"),
    ],
)
def test_a_message_survives_the_wire(message):
    data = wire.frame(message)
    assert wire.body_bytes(data[: wire.HEAD_BYTES]) == len(data) - wire.HEAD_BYTES
    assert wire.parse(data[wire.HEAD_BYTES :]) == message


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"kind": "what"}', b'{"kind": "hello"}', b"\xff"])
def test_what_is_no_message_is_refused(body):
    with pytest.raises(ProtocolError):
        wire.parse(body)


def test_a_huge_frame_is_refused():
    with pytest.raises(ProtocolError, match="4294967295 bytes"):
        wire.body_bytes(b"\xff" * 4)
