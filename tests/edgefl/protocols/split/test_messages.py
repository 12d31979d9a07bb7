"""Frames of split training: there and back, in any pieces, and what is none."""

from __future__ import annotations

import json
import struct

import pytest

from edgefl.errors import ProtocolError
from edgefl.protocols.split.messages import BeginTraining, Forward, FrameReader, Kept, pack, parse_frame

FORWARD = Forward(step=3, number=1, of=2, share=0.5, inputs='["float32",[1]]', differentiable=["h"])


def test_a_frame_is_read_in_any_pieces() -> None:
    data = pack(FORWARD, b"values", b"") + pack(Kept(step=1))
    for size in (1, 3, 1000):
        reader = FrameReader()
        found = [
            parse_frame(body) for start in range(0, len(data), size) for body in reader.feed(data[start : start + size])
        ]
        assert [one.message for one in found] == [FORWARD, Kept(step=1)]
        assert [bytes(one) for one in found[0].sections] == [b"values", b""]


def framed(header: dict[str, object], sections: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<I", len(text)) + text + sections


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "ends within its header"),
        (struct.pack("<I", 1 << 30), "ends within its header"),
        (struct.pack("<I", 1) + b"{", "not JSON"),
        (framed({"kind": "other", "sections": []}), "of no known kind"),
        (framed({"kind": "kept", "step": 1}), "has sections None"),
        (framed({"kind": "kept", "step": 1, "sections": [5]}, b"1234"), r"has sections \[5\]"),
        (framed({"kind": "kept", "step": 1, "sections": [-4, 8]}, b"1234"), "which are not its bytes"),
        (framed({"kind": "kept", "step": -1, "sections": []}), "step is -1"),
        (framed({"kind": "kept", "sections": []}), "step is missing"),
        (
            framed({"kind": "forward", "step": 0, "number": 0, "of": 1, "share": 2.0, "inputs": "", "sections": []}),
            "share",
        ),
    ],
)
def test_what_is_no_frame_is_refused(body: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        parse_frame(body)


def test_a_frame_that_is_too_long_is_refused_before_it_is_received() -> None:
    reader = FrameReader(max_bytes=100)
    with pytest.raises(ProtocolError, match="a message of 101 bytes; expected 4 to 100"):
        list(reader.feed(struct.pack("<I", 101)))


def test_a_training_has_a_sample_and_a_step() -> None:
    for samples, steps in ((0, 1), (1, 0)):
        with pytest.raises(ProtocolError, match="expected 1 to"):
            BeginTraining(version=1, job="j", round=1, bundle="", samples=samples, steps=steps, inputs="")
