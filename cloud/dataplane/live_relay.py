"""One running relay: the messages that wait for an answer, and the answers that wait for its operator."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cloud.dataplane.open_round import OnlineState, OpenRound
from cloud.state.blobs import BlobStore, blake3_of
from cloud.state.relay_rows import RelayMessage
from edgefl.errors import ConfigError
from edgefl.exchange import GiveUpReason
from edgefl.exchange.terms import RETURN_S
from edgefl.protocols.messages import BlobRef, Deliver, Signed

MAX_MESSAGE_BYTES = (1 << 30) + (16 << 20)  # content of a message or a reply, with its envelope

Line = Mapping[str, Any]  # an answer, in the operator's stream of events


@dataclass(frozen=True, kw_only=True, slots=True)
class RelayTiming:
    """Timeouts of a relay, in seconds, and its clocks."""

    operator_s: float = 60.0  # without a request of the operator, after which the relay fails
    device_s: float = 30.0  # offline, after which a device is given up
    return_s: float = RETURN_S  # more, for a device without a message since the cloud's start
    stream_s: float = 60.0  # lifetime of an operator's stream; the operator reconnects, which shows that it is alive
    clock: Callable[[], float] = time.monotonic
    time_of_day: Callable[[], float] = time.time  # seconds since 1970, as in `RelayMessage.expires_s`


@dataclass(slots=True)
class SentMessage:
    """A message that waits for its answer."""

    relay: str
    number: int
    device: str
    opened: OpenRound
    online_state: OnlineState = OnlineState.ONLINE  # of its device, as last passed to the exchange
    given_up: GiveUpReason | None = None  # set by its exchange; the cloud then answers for the device


@dataclass(slots=True)
class LiveRelay:
    """The state of a relay in memory."""

    id: str
    bundle: Signed
    contents: BlobStore  # of its messages
    last_request_s: float  # time of the operator's last request
    paused_before_s: float  # total pauses of the storage before it started
    waiting: dict[int, SentMessage] = field(default_factory=dict)  # messages without an answer
    replies: dict[int, Line] = field(default_factory=dict)  # answers that the operator has not confirmed
    hashes: dict[str, tuple[BlobRef, str]] = field(default_factory=dict)
    devices: set[str] = field(default_factory=set)  # that were sent a message
    last: int = 0
    resumed: bool = False  # after a restart, so that `devices` is incomplete

    def assignment(self, message: RelayMessage, within_s: float) -> Deliver:
        """Return the assignment for a message; raises ConfigError if its content was not uploaded."""
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

    def _content(self, message: RelayMessage) -> tuple[BlobRef, str]:
        """Return a message's content; its hash is computed once, because messages may share it."""
        sha256 = message.content_sha256
        if sha256 not in self.hashes:
            path = self.contents.path(sha256)
            if not path.exists():
                raise ConfigError(f"content {sha256[:16]}... of message {message.number} is missing; upload it first")
            self.hashes[sha256] = BlobRef(sha256=sha256, size=path.stat().st_size), blake3_of(path)
        return self.hashes[sha256]
