"""Fields: what each type holds, by hand; every message of the project, by enemy."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from edge_agent.training import trainer_wire
from edgefl.config import TrainConfig
from edgefl.errors import ProtocolError
from edgefl.protocols import manifest, messages
from edgefl.protocols.fields import Checked, check, from_json, limited, parse_json, prose, raw, to_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Part(Checked):
    size: int = field(default=0, metadata=limited(least=0, most=9))


@dataclass(frozen=True, kw_only=True, slots=True)
class Plain:
    lr: float = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Whole(Checked):
    flag: bool = False
    number: int = 0
    share: float = 0.0
    name: str = ""
    said: str = field(default="", metadata=prose(20))
    path: str = field(default="", metadata=raw())
    maybe: float | None = None
    counts: Mapping[str, int] = field(default_factory=dict, metadata=limited(max_items=2, max_chars=3))
    names: Sequence[str] = ()
    part: Part = field(default_factory=Part)
    plain: Plain = field(default_factory=Plain)
    options: Mapping[str, Any] = field(default_factory=dict)


GOOD = {
    "flag": True, "number": 2**63 - 1, "share": 1, "name": "süß", "path": "a\nb", "maybe": None,
    "counts": {"abc": -(2**63)}, "names": ["a"], "part": {"size": 9}, "plain": {"lr": 1}, "options": {"a": [1, {}]},
}  # fmt: skip
BAD: dict[str, list[Any]] = {
    "flag": [1, 0, "true", None],
    "number": [True, 1.0, 2**63, -(2**63) - 1, 10**22, 10**3999, "1", None, [1]],
    "share": [True, math.nan, math.inf, -math.inf, 10**3999, "1", None],
    "name": ["\x1b[31m", "a\nb", "\0", "\x7f", "\x9b", "\u202e", "\u2028", "\ud800", "x" * 70_000, 1, None, ["a"]],
    "said": [1, None, []],
    "maybe": [math.nan, "1", True],
    "counts": [{"abcd": 1}, {"a\x1b": 1}, {"a": 1.5}, {"a": 10**22}, {"a": 1, "b": 2, "c": 3}, [], "a", {"a": True}],
    "names": [["\x1b"], [1], ["a"] * 1001, "abc", {}],
    "part": [{"size": 10}, {"size": -1}, {"size": True}, [], 3, None],
    "plain": [{"lr": math.nan}, {"lr": True}, []],
    "options": [{"a": math.inf}, {"a": [{"b": "\x1b"}]}, {"a": 10**22}, {str(n): n for n in range(1001)}],
}


def test_what_is_right_passes_and_a_whole_number_is_a_number() -> None:
    whole = from_json(Whole, {**GOOD, "said": "x\x1b[0m\ny", "colour": 3})
    assert whole.said == "x\\x1b[0m y"
    assert isinstance(whole.share, float)
    assert whole == from_json(Whole, json.loads(json.dumps(dataclasses.asdict(whole))))


@pytest.mark.parametrize(("name", "at"), [(name, at) for name, values in BAD.items() for at in range(len(values))])
def test_what_a_field_cannot_hold_is_refused(name: str, at: int) -> None:
    value = BAD[name][at]
    with pytest.raises(ProtocolError, match=r"^[ -~\xa0-\uffff]{1,600}$"):  # one line, and short
        from_json(Whole, {**GOOD, name: value})


def test_a_message_of_ours_is_checked_at_birth() -> None:
    with pytest.raises(ProtocolError, match=r"Whole: name is '.x1b', expected text without control characters"):
        Whole(name="\x1b")
    with pytest.raises(ProtocolError, match="Part: size is 10, expected 0 to 9"):
        Part(size=10)


def test_a_record_that_is_no_message_is_checked_where_it_is_decoded() -> None:
    with pytest.raises(ProtocolError, match="Plain: lr is nan"):
        from_json(Plain, {"lr": math.nan})
    check(Plain(lr=1.0))


@pytest.mark.parametrize("data", [b"9" * 5000, b"[" * 30_000, b'{"a": \xff}', b"", b"\xff\xfe", b"{", b"nul"])
def test_whatever_json_trips_over_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="not JSON"):
        parse_json(data)


def test_what_is_nested_too_deep_is_refused_where_it_is_checked_too() -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ProtocolError):
        from_json(Whole, {"options": {"a": deep}})


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ProtocolError, match=r"^BlobRef: size is missing$"):
        from_json(messages.BlobRef, {"sha256": "ab"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Careless:
    """A record whose own check trusts the types of its fields."""

    lr: float = 0.1

    def __post_init__(self) -> None:
        assert self.lr > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Nested(Checked):
    parts: Mapping[str, Careless] = field(default_factory=dict)
    maybe: Part | None = None
    several: Sequence[Part] = ()


def test_what_stands_in_collections_is_built_and_checked_too() -> None:
    whole = from_json(Nested, {"parts": {"a": {"lr": 1}}, "maybe": {"size": 3}, "several": [{"size": 4}]})
    assert whole == Nested(parts={"a": Careless(lr=1.0)}, maybe=Part(size=3), several=[Part(size=4)])
    assert from_json(Nested, {"maybe": None}) == Nested()
    for bad in ({"parts": {"a": {"lr": "1"}}}, {"parts": [1]}, {"parts": {"a": 1}}, {"several": {}}, {"several": [3]}):
        with pytest.raises(ProtocolError, match="expected"):
            from_json(Nested, bad)


@pytest.mark.parametrize("value", [[], 3, "x", None, True])
def test_a_message_is_an_object(value: Any) -> None:
    with pytest.raises(ProtocolError, match="not an object"):
        from_json(Whole, value)


PIECE = {"sha256": "ab", "size": 4}
RELEASE = {"model": "m", "version": 1, "blob": PIECE, "metrics": {"accuracy": 0.5}}
PARENT = {"name": "oslo", "url": "https://o:9480", "grpc": "o:9440", "broker": "mqtts://o:8883"}
EVERY: dict[type, dict[str, Any]] = {
    messages.BlobRef: PIECE,
    messages.Signed: {"text": "{}", "key_id": "k", "signature": "s"},
    messages.Division: {"in_cloud": {"last.weight": "last.weight"}, "buffers": ["norm.count"], "device_frozen": PIECE},
    messages.ModelReport: {"version": 1, "placement": "split:relu", "profile_ms": {"device": 1.5}},
    messages.Fit: {
        "job": "j", "round": 1, "model": PIECE, "model_blake3": "00", "train": {"lr": 0.5}, "deadline_s": 6.0,
        "bundle": {"text": "{}", "key_id": "k", "signature": "s"}, "max_update_bytes": 9,
    },
    messages.Deliver: {
        "job": "j", "round": 1, "content": PIECE, "content_blake3": "00", "envelope": "e", "deadline_s": 6.0,
        "bundle": {"text": "{}", "key_id": "k", "signature": "s"}, "max_update_bytes": 9,
    },
    messages.Evaluate: {
        "job": "j", "round": 1, "model": PIECE, "model_blake3": "00", "seed": 1, "deadline_s": 6.0,
        "bundle": {"text": "{}", "key_id": "k", "signature": "s"}, "max_update_bytes": 9,
    },
    messages.LogWanted: {"request": "r", "lines": 5, "job": "j"},
    messages.NewParents: {"signed": {"text": "{}", "key_id": "k", "signature": "s"}},
    messages.RoundClosed: {"job": "j", "round": 1, "job_ended": True},
    messages.UpdateRefused: {"job": "j", "round": 1, "reason": "r"},
    messages.DeviceState: {
        "session": 1, "online": True, "agent_version": "1", "models": {"m": 1}, "tags": {"a": "b"}, "serving_url": "u",
    },
    messages.RolloutNote: {"model": "m", "version": 1, "state": "active", "detail": "d"},
    messages.Telemetry: {
        "cpu_count": 1, "cpu_percent": 1.0, "load_1m": 1.0, "ram_total_mb": 1.0, "ram_available_mb": 1.0,
        "disk_free_mb": 1.0, "battery_percent": 1.0, "on_mains": True,
    },
    manifest.Bundle: {"blob": PIECE, "task": "a:b"},
    manifest.Release: RELEASE,
    manifest.Desired: {"device": "d", "release": RELEASE, "sequence": 1, "rollback": False},
    manifest.ParentAddress: PARENT,
    manifest.Parents: {"device": "d", "sequence": 1, "parents": [PARENT], "former": ["oslo"]},
    trainer_wire.Hello: {"pid": 1},
    trainer_wire.WorkDone: {"size": 1, "blake3": "00", "weight": 1.0, "metrics": {"a": 1.0}, "changed": False},
    trainer_wire.WorkFailed: {"reason": "r", "spent": False},
    TrainConfig: {"epochs": 1},
}  # fmt: skip
NASTY = [
    None, True, 0, -1, 1.5, 10**22, -(10**22), 10**3999, 2**63, math.nan, math.inf, -math.inf, 1e308, "", "x", "\0",
    "\x1b[2J", "a\nb", "\ud800", "\u202e", "x" * 32_000, [], [[]], {}, {"": ""}, {"\x1b": 1}, {"a": {"a": {}}},
    {"k" * 32_000: 1}, {str(n): "v" for n in range(3000)}, [0] * 5000, {"__class__": "x"}, b"bytes",
]  # fmt: skip


def holders(value: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of every place in a JSON value."""
    if not isinstance(value, dict):
        return []
    return [(value, key) for key in value] + [place for one in value.values() for place in holders(one)]


@pytest.mark.parametrize("schema", EVERY, ids=lambda one: one.__name__)
def test_a_message_is_written_field_by_field(schema: type) -> None:
    message = from_json(schema, EVERY[schema])
    assert to_json(message) == dataclasses.asdict(message)


@pytest.mark.parametrize("schema", EVERY, ids=lambda one: one.__name__)
def test_a_message_is_whole_or_refused_whatever_stands_in_a_field(schema: type) -> None:
    assert from_json(schema, EVERY[schema])
    num_places = len(holders(EVERY[schema]))
    for place in range(num_places):
        for nasty in NASTY:
            value = json.loads(json.dumps(EVERY[schema]))
            container, key = holders(value)[place]
            container[key] = copy.deepcopy(nasty)
            can_be_used(schema, value)


@pytest.mark.parametrize("schema", EVERY, ids=lambda one: one.__name__)
def test_a_message_is_whole_or_refused_whatever_json_comes(schema: type) -> None:
    draw = random.Random(schema.__name__)
    for _ in range(100):
        value = json.loads(json.dumps(EVERY[schema]))
        for _ in range(draw.randint(1, 4)):
            places = holders(value)
            container, key = draw.choice(places)
            if draw.random() < 0.3:
                container[draw.choice(NASTY[13:21])] = container.pop(key)
            else:
                container[key] = copy.deepcopy(draw.choice(NASTY))
            if not holders(value):
                break
        can_be_used(schema, value)


def can_be_used(schema: type, value: Any) -> None:
    """A message is refused with a ProtocolError, or can be encoded, stored in 64 bits, and shown."""
    try:
        message = from_json(schema, value)
    except ProtocolError as fault:
        str(fault).encode()
        return
    parts = json.loads(json.dumps(dataclasses.asdict(message), allow_nan=False))
    for signed in (parts, parts.get("bundle", {}), parts.get("signed", {})):
        signed.pop("text", None)  # what is signed is checked with its signature
    for part in leaves(parts):
        assert not isinstance(part, int) or -(2**63) <= part < 2**63
        if isinstance(part, str):
            part.encode()
            assert "\x1b" not in part


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for pair in value.items() for one in pair for leaf in leaves(one)]
    if isinstance(value, list):
        return [leaf for one in value for leaf in leaves(one)]
    return [value]


def test_every_message_of_the_project_is_in_the_table() -> None:
    found = set()
    for module in (messages, manifest, trainer_wire):
        for one in vars(module).values():
            if isinstance(one, type) and dataclasses.is_dataclass(one) and one.__module__ == module.__name__:
                found.add(one)
                assert issubclass(one, Checked), one
    assert found - set(EVERY) == {
        trainer_wire.TaskRequest,
        trainer_wire.FitRequest,
        trainer_wire.EvaluateRequest,
        trainer_wire.DeliverRequest,
    }  # they go from the agent to its own child
