"""The trainer's connection to the cloud's part: through the agent, which has the device's identity.

The trainer runs the user's code, so it has no key: it connects to a socket of the agent, which opens a stream to the
cloud for each connection and passes bytes on (`tunnel.py`). On the socket, each record is

    uint8 kind, uint32 length (big-endian), content

of kind DATA (bytes of the stream) or, from the agent, END: how the stream ended, as JSON (status, reason).
Invariant: `receive` returns a frame, raises LinkLost if another connection may help, or TaskError if none can.
"""

from __future__ import annotations

import json
import socket
import struct
from collections import deque
from pathlib import Path
from typing import Protocol

from edgefl.errors import ProtocolError, TaskError
from edgefl.protocols.split.messages import Frame, FrameReader, Message, StreamRefused, pack, parse_frame

DATA, END = 0, 1
HEAD = struct.Struct(">BI")
MAX_RECORD_BYTES = 1 << 20
_PASSING = {"UNAVAILABLE", "UNKNOWN", "INTERNAL", "CANCELLED", "DEADLINE_EXCEEDED"}  # status of a stream that broke


class LinkLost(Exception):
    """The connection to the cloud's part ended; the device's training is as it was before the current step."""


class SplitLink(Protocol):
    """A stream to the cloud's part."""

    def send(self, message: Message, *sections: bytes) -> None: ...

    def receive(self) -> Frame: ...

    def close(self) -> None: ...


class SocketLink:
    """A stream through the agent's socket."""

    def __init__(self, path: Path, answer_s: float) -> None:
        """Connect; raises LinkLost if the agent does not listen."""
        self._answer_s, self.sent_bytes, self.received_bytes = answer_s, 0, 0
        self._reader, self._frames = FrameReader(), deque[bytes]()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(answer_s)
        try:
            self._socket.connect(str(path))
        except OSError as cause:
            self._socket.close()
            raise LinkLost(f"the agent's socket {path} cannot be connected: {cause}") from cause

    def send(self, message: Message, *sections: bytes) -> None:
        """Send a frame; raises LinkLost, and TaskError if the stream has ended because the cloud refuses."""
        data = memoryview(pack(message, *sections))
        self.sent_bytes += len(data)
        try:
            for start in range(0, len(data), MAX_RECORD_BYTES):
                some = data[start : start + MAX_RECORD_BYTES]
                self._socket.sendall(HEAD.pack(DATA, len(some)))
                self._socket.sendall(some)
        except BrokenPipeError as cause:  # the agent has ended the stream, and may have said why before
            raise self._said_at_end() from cause
        except OSError as cause:
            raise self._lost(cause) from cause

    def receive(self) -> Frame:
        """Return the next frame; raises LinkLost, TaskError if the cloud refuses, ProtocolError for a wrong one."""
        while not self._frames:
            try:
                kind, length = HEAD.unpack(self._exactly(HEAD.size))
                content = self._exactly(length)
            except OSError as cause:  # also TimeoutError
                raise self._lost(cause) from cause
            if kind == END:
                raise ended(*_end_of(content))
            self.received_bytes += length
            self._frames.extend(self._reader.feed(content))
        frame = parse_frame(self._frames.popleft())
        if isinstance(frame.message, StreamRefused):
            raise ended(frame.message.status, frame.message.reason)
        return frame

    def close(self) -> None:
        self._socket.close()

    def _said_at_end(self) -> LinkLost | TaskError:
        try:
            while True:
                self.receive()
        except (LinkLost, TaskError) as said:
            return said

    def _exactly(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            part = self._socket.recv(length - len(data))
            if not part:
                raise ConnectionResetError("the agent closed the connection")
            data += part
        return bytes(data)

    def _lost(self, cause: OSError) -> LinkLost:
        late = f"no answer within {self._answer_s:g} s" if isinstance(cause, TimeoutError) else str(cause)
        return LinkLost(f"the connection to the cloud's part ended: {late}")


def end_record(status: str, reason: str) -> bytes:
    """Return the record by which the agent says how a stream ended."""
    content = json.dumps({"status": status, "reason": reason[:2000]}).encode()
    return HEAD.pack(END, len(content)) + content


def ended(status: str, reason: str) -> LinkLost | TaskError:
    """Return the error of a stream that ended with this status."""
    if status in _PASSING:
        return LinkLost(f"the cloud's part cannot be reached ({status}): {reason}")
    return TaskError(f"the cloud's part refuses this device ({status}): {reason}")


def _end_of(content: bytes) -> tuple[str, str]:
    try:
        said = json.loads(content)
        return str(said["status"]), str(said["reason"])
    except (ValueError, KeyError, TypeError) as cause:
        raise ProtocolError(f"an invalid end of a stream from the agent: {content[:80]!r}") from cause
