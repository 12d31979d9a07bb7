"""The placement section of a manifest: what is refused, and which files a device needs."""

from __future__ import annotations

import dataclasses
import math

import pytest

from edgefl.errors import ProtocolError
from edgefl.protocols.fields import from_json, to_json
from edgefl.protocols.inference.placement import (
    AUTO,
    CLOUD,
    DEVICE,
    Fallback,
    ModelPart,
    Offload,
    Placement,
    split_address,
)
from edgefl.protocols.messages import BlobRef


def part(digit):
    return ModelPart(blob=BlobRef(sha256=digit * 64, size=1), sample=BlobRef(sha256=digit * 64, size=2))


IN_CLOUD = Placement(name=CLOUD, layers=0, crossing=["x"], form="fp16", device_bytes=0)
SPLIT = Placement(name="split:h", layers=2, head=part("1"), crossing=["h"], form="int8", device_bytes=100)
WHOLE = Placement(name=DEVICE, layers=5, head=part("2"), device_bytes=1000)
OFFLOAD = Offload(use=AUTO, placements=[IN_CLOUD, SPLIT, WHOLE], stages=["10.0.0.1:9450"])


def names(placements):
    return [one.name for one in placements]


def test_it_is_the_same_after_a_journey_as_json() -> None:
    placed = dataclasses.replace(OFFLOAD, fallback=Fallback(part=part("3"), behind="split:h"))
    assert to_json(from_json(Offload, to_json(placed))) == to_json(placed)


def test_a_device_chooses_by_its_wish_and_its_memory() -> None:
    assert names(OFFLOAD.chosen("", math.inf)) == [CLOUD, "split:h", DEVICE]
    assert names(OFFLOAD.chosen("", 999)) == [CLOUD, "split:h"]
    assert names(OFFLOAD.chosen("split:h", 1)) == ["split:h"]  # it was asked for
    only = dataclasses.replace(OFFLOAD, use="split:h")
    assert names(only.chosen("", 1)) == ["split:h"]
    assert names(only.chosen(AUTO, 99)) == [CLOUD]
    with pytest.raises(ProtocolError, match="has no placement 'split:other'; it has: auto, cloud, split:h, device"):
        OFFLOAD.chosen("split:other", math.inf)
    large = dataclasses.replace(OFFLOAD, placements=[SPLIT, WHOLE])
    with pytest.raises(ProtocolError, match=r"no placement of the release fits .*: 99 bytes; the smallest needs 100"):
        large.chosen("", 99)


def test_the_files_that_a_device_needs() -> None:
    assert OFFLOAD.parts([SPLIT]) == {"head-2": part("1")}
    assert OFFLOAD.parts([IN_CLOUD]) == {}
    small = dataclasses.replace(OFFLOAD, fallback=Fallback(part=part("3")))
    assert small.parts([IN_CLOUD]) == {"fallback": part("3")}
    early = dataclasses.replace(OFFLOAD, fallback=Fallback(part=part("3"), behind="split:h"))
    assert early.parts([IN_CLOUD]) == {"head-2": part("1"), "fallback": part("3")}
    assert small.all_parts().keys() == {"head-2", "head-5", "fallback"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"placements": []}, "placements are none; expected each once"),
        ({"placements": [SPLIT, SPLIT]}, "placements are split:h, split:h; expected each once"),
        ({"use": "split:other"}, "use is 'split:other', expected auto or one of: cloud, split:h, device"),
        ({"fallback": Fallback(part=part("3"), behind="x")}, "the fall-back is behind 'x', which is no placement"),
        ({"stages": ["10.0.0.1"]}, "'10.0.0.1' is no address of a stage server; expected HOST:PORT"),
        ({"threshold": math.nan}, "threshold is nan, not a finite number"),
        ({"timeout_ms": 0.0}, "timeout_ms is 0.0, not a finite number from 1 to 60000"),
        ({"placements": [SPLIT] * 9}, "placements has 9 entries, expected 8 at most"),
    ],
)
def test_what_is_no_section(change, words) -> None:
    with pytest.raises(ProtocolError, match=words):
        dataclasses.replace(OFFLOAD, **change)


def test_addresses() -> None:
    assert split_address("cloud.example.org:9450") == ("cloud.example.org", 9450)
    assert split_address("[::1]:9450") == ("[::1]", 9450)
    for wrong in ("", ":9450", "host:", "host:0", "host:65536", "host:x"):
        with pytest.raises(ProtocolError, match="is no address of a stage server"):
            split_address(wrong)
