"""Messages of a Flower app as bytes between its ServerApp and devices: in Flower's protobuf form, without pickle.

    order      what several messages share: the run config, then the records
    envelope   a message's metadata: small, as text
    reply      a whole message; its own metadata is not trusted, see `open_reply`
    state      a node's `context.state`

Bytes from the network are not trusted: any other form raises ProtocolError.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from flwr.app import Message, RecordDict
from google.protobuf.message import DecodeError

from edgefl.errors import ConfigError, ProtocolError
from edgefl.flower import internals
from edgefl.flower.apps.app import RunConfigValue
from edgefl.flower.records import records_bytes

MAX_MESSAGE_BYTES = 1 << 30  # half of protobuf's limit
MAX_ENVELOPE_CHARS = 8 << 10  # it is sent in a small message of the control plane
_HEAD = struct.Struct(">I")


def pack_order(run_config: Mapping[str, RunConfigValue], content: RecordDict) -> bytes:
    """Return the bytes that messages with this content share; raises ConfigError above the limit."""
    size = records_bytes(content)
    if size > MAX_MESSAGE_BYTES:  # check before copying
        raise ConfigError(f"a message of {size} bytes; at most {MAX_MESSAGE_BYTES} are allowed. Send less per message")
    config = internals.config_bytes(run_config)
    return b"".join((_HEAD.pack(len(config)), config, internals.records_bytes(content)))


def open_order(data: bytes, envelope: str) -> tuple[Message, dict[str, RunConfigValue]]:
    """Return a message and the run config; raises ProtocolError."""
    with _foreign_bytes("a Flower message"):
        (length,) = _HEAD.unpack_from(data)
        start = _HEAD.size + length
        if start > len(data):
            raise ProtocolError(f"a Flower message of {len(data)} bytes whose run config alone has {length}")
        run_config = internals.config_from(data[_HEAD.size : start])
        content = internals.records_from(data[start:])
        return internals.message_of(base64.b64decode(envelope, validate=True), content), run_config


def pack_envelope(message: Message) -> str:
    """Return a message's metadata as text; raises ConfigError if it is too long."""
    envelope = base64.b64encode(internals.metadata_bytes(message)).decode()
    if len(envelope) > MAX_ENVELOPE_CHARS:
        raise ConfigError(
            f"the metadata of a message take {len(envelope)} characters; at most {MAX_ENVELOPE_CHARS} are allowed. "
            "Shorten its group_id or message_type, and put the rest into a ConfigRecord"
        )
    return envelope


def pack_reply(reply: Message) -> bytes:
    """Return a reply's bytes."""
    return internals.message_bytes(reply)


def open_reply(data: bytes, request: Message) -> Message:
    """Return a device's reply to this request, whatever its own metadata claims; raises ProtocolError."""
    with _foreign_bytes("a reply"):
        return internals.reply_from(data, request)


def pack_state(state: RecordDict) -> bytes:
    """Return a node's state as bytes; no bytes for an empty state."""
    return internals.records_bytes(state)


def open_state(data: bytes) -> RecordDict:
    """Return what `pack_state` packed; raises ProtocolError."""
    with _foreign_bytes("a node's state"):
        return internals.records_from(data)


def node_id(device: str) -> int:
    """Return a device's node id in Flower, the same in every run; never 0 or 1, which have a meaning in Flower."""
    digest = hashlib.sha256(f"edgefl node {device}".encode()).digest()
    return (int.from_bytes(digest[:8]) >> 1) | 2


def node_config(options: Mapping[str, str], parse: Callable[[str], RunConfigValue]) -> dict[str, RunConfigValue]:
    """Return a device's data options as Flower's node config; `part` and `parts` get Flower's names."""
    names = {"part": internals.PARTITION_ID_KEY, "parts": internals.NUM_PARTITIONS_KEY}
    return {names.get(key, key): parse(value) for key, value in options.items()}


@contextmanager
def _foreign_bytes(what: str) -> Iterator[None]:
    try:
        yield
    except (DecodeError, ValueError, TypeError, KeyError, struct.error) as cause:
        if isinstance(cause, ProtocolError):
            raise
        raise ProtocolError(f"{what} is not in Flower's form: {cause!r:.200}") from cause
