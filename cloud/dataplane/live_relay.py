"""One running relay: which of its messages wait for an answer, and which answers wait for its operator."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cloud.dataplane.open_round import OpenRound, Standing
from cloud.state.blobs import BlobStore, blake3_of
from cloud.state.relay_rows import Message
from edgefl.errors import ConfigError
from edgefl.exchange import Why
from edgefl.exchange.terms import RETURN_S
from edgefl.protocols.messages import BlobRef, Deliver, Signed

MAX_MESSAGE_BYTES = (1 << 30) + (16 << 20)  # of what a message or a reply holds, and what surrounds it

Line = Mapping[str, Any]  # an answer as the operator hears of it


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long whom is waited for, in seconds."""

    operator_s: float = 60.0  # not heard of
    device_s: float = 30.0  # offline
    return_s: float = RETURN_S  # more, for a device that has not been heard of since the cloud's start
    stream_s: float = 60.0  # an operator's stream ends and is asked for again: so a dead one is not taken for alive
    clock: Callable[[], float] = time.monotonic
    time_of_day: Callable[[], float] = time.time  # seconds since 1970: a message's end is given so


@dataclass(slots=True)
class SentMessage:
    """A message that waits for its answer."""

    relay: str
    number: int
    device: str
    opened: OpenRound
    standing: Standing = Standing.ONLINE  # of its device, as the exchange was told last
    given_up: Why | None = None  # by its exchange: the cloud answers for the device


@dataclass(slots=True)
class LiveRelay:
    """The state of a relay, but for what is durable."""

    id: str
    bundle: Signed
    contents: BlobStore  # of what messages hold
    heard_s: float  # of its operator
    paused_before_s: float  # of pauses of the storage before it began here
    waiting: dict[int, SentMessage] = field(default_factory=dict)  # for an answer
    replies: dict[int, Line] = field(default_factory=dict)  # those that wait for the operator
    hashes: dict[str, tuple[BlobRef, str]] = field(default_factory=dict)
    devices: set[str] = field(default_factory=set)  # that were sent something
    last: int = 0
    resumed: bool = False  # after a restart: nobody knows who was sent something before

    def assignment(self, message: Message, within_s: float) -> Deliver:
        """Return what a device is sent; raises ConfigError where what the message holds is not here."""
        content, fast = self._content(message)
        return Deliver(
            job=self.id,
            round=message.number,
            envelope=message.envelope,
            content=content,
            content_blake3=fast,
            bundle=self.bundle,
            deadline_s=within_s,
            max_update_bytes=MAX_MESSAGE_BYTES,
        )

    def _content(self, message: Message) -> tuple[BlobRef, str]:
        """Return what messages may share, hashed once."""
        sha256 = message.content_sha256
        if sha256 not in self.hashes:
            path = self.contents.path(sha256)
            if not path.exists():
                raise ConfigError(f"what message {message.number} holds, {sha256[:16]}..., is not here; send it first")
            self.hashes[sha256] = BlobRef(sha256=sha256, size=path.stat().st_size), blake3_of(path)
        return self.hashes[sha256]
