"""What goes over the wire comes out as it was, and what is no message of Flower's is refused."""

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from edgefl.errors import ConfigError, ProtocolError
from edgefl.flower.apps.app import parse_value
from edgefl.flower.fleet import wire
from edgefl.flower.internals import error_reply, give_id, task_identity

CONFIG = {"rate": 0.5, "name": "a b", "count": 3, "on": True}


@pytest.fixture
def message():
    records = {
        "arrays": ArrayRecord([np.arange(6, dtype=np.float32).reshape(2, 3), np.array(7)]),
        "metrics": MetricRecord({"a": 1.5, "b": [1, 2]}),
        "config": ConfigRecord({"text": "x", "bytes": b"\x00", "flag": False}),
    }
    with task_identity(9):
        one = Message(RecordDict(records), 12345678901234567, "train.special", ttl=30.0, group_id="2")
    give_id(one, "9-1")
    return one


def test_a_message_arrives_as_it_was_sent(message):
    order, envelope = wire.pack_order(CONFIG, message.content), wire.pack_envelope(message)
    seen, config = wire.open_order(order, envelope)
    assert config == CONFIG
    assert {key: type(value) for key, value in config.items()} == {key: type(value) for key, value in CONFIG.items()}
    assert seen.content == message.content
    for name in ("run_id", "message_id", "src_node_id", "dst_node_id", "group_id", "ttl", "message_type"):
        assert getattr(seen.metadata, name) == getattr(message.metadata, name)


def test_the_same_content_has_the_same_bytes(message):
    assert wire.pack_order(CONFIG, message.content) == wire.pack_order(dict(CONFIG), message.content)


def test_a_message_may_hold_nothing(message):
    message.content = RecordDict()
    seen, _ = wire.open_order(wire.pack_order({}, message.content), wire.pack_envelope(message))
    assert seen.content == RecordDict()


def test_a_reply_arrives_with_its_content_or_its_error(message):
    reply = Message(RecordDict({"m": MetricRecord({"a": 1})}), reply_to=message)
    seen = wire.open_reply(wire.pack_reply(reply), message)
    assert seen.content == reply.content
    failed = wire.open_reply(wire.pack_reply(error_reply(message, "no data", 2)), message)
    assert (failed.error.code, failed.error.reason) == (2, "no data")


def test_who_answers_what_is_not_the_devices_word(message):
    with task_identity(1):
        other = Message(RecordDict(), 99, "query")
    give_id(other, "another")
    seen = wire.open_reply(wire.pack_reply(Message(Error(0, "x"), reply_to=other)), message)
    assert seen.metadata.reply_to_message_id == "9-1"
    assert (seen.metadata.src_node_id, seen.metadata.run_id) == (12345678901234567, 9)


def test_a_state_is_kept_and_an_empty_one_is_no_bytes(message):
    assert wire.open_state(wire.pack_state(message.content)) == message.content
    assert wire.pack_state(RecordDict()) == b""
    assert wire.open_state(b"") == RecordDict()


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"\xff\xff\xff\xff", bytes(4) + b"\xff garbage", b"\x00\x00\x00\x05abcdexyz"]
)
def test_other_bytes_are_refused(message, data):
    with pytest.raises(ProtocolError):
        wire.open_order(data, wire.pack_envelope(message))
    with pytest.raises(ProtocolError):
        wire.open_reply(b"\xff" + data, message)
    with pytest.raises(ProtocolError):
        wire.open_state(b"\xff" + data)


@pytest.mark.parametrize("envelope", ["?", "AAAA"])
def test_another_envelope_is_refused(message, envelope):
    with pytest.raises(ProtocolError):
        wire.open_order(wire.pack_order({}, message.content), envelope)


def test_what_is_too_large_is_refused_before_it_travels(message, monkeypatch):
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 10)
    with pytest.raises(ConfigError, match="at most 10 are allowed"):
        wire.pack_order({}, message.content)
    with task_identity(1):
        long = Message(RecordDict(), 5, "query", group_id="g" * 10_000)
    with pytest.raises(ConfigError, match="Shorten its group_id"):
        wire.pack_envelope(long)


def test_a_device_has_one_number_in_every_run():
    assert wire.node_id("cam-1") == wire.node_id("cam-1") != wire.node_id("cam-2")
    assert all(1 < wire.node_id(str(n)) < 1 << 63 for n in range(1000))


def test_data_options_are_a_node_config():
    options = {"part": "1", "parts": "3", "rate": "0.5", "on": "true", "folder": "/data/x", "list": "[1]"}
    assert wire.node_config(options, parse_value) == {
        "partition-id": 1, "num-partitions": 3, "rate": 0.5, "on": True, "folder": "/data/x", "list": "[1]",
    }  # fmt: skip
