"""Activations that devices with a frozen part have sent: kept on disk until the job ends, each sample once.

    FOLDER/<device>.rows   records: 16 bytes key, uint32 length, content
                           content: uint32 length, values (`edgefl.offload.wire`), uint32 length, targets

A device's rows are its own: what another device has sent cannot be named, and so not be poisoned. A record that a kill
has cut off is cut away when the file is opened.
Invariant: `row` returns what `add` was given, whose tensors have been decoded and are finite.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgefl.errors import ProtocolError
from edgefl.offload import wire
from edgefl.protocols.split.messages import KEY_BYTES
from edgefl.trees import Array

_LENGTH = struct.Struct("<I")
_HEAD_BYTES = KEY_BYTES + _LENGTH.size


class QuotaExceeded(Exception):
    """The rows of a device, or of all devices, would have more bytes than they may have."""


class CacheQuota:
    """The bytes that all devices' rows may have together."""

    def __init__(self, device_bytes: int, all_bytes: int) -> None:
        self.device_bytes, self._all_bytes, self._held = device_bytes, all_bytes, 0

    def take(self, device: str, held: int, num_bytes: int) -> None:
        """Count bytes; raises QuotaExceeded."""
        if held + num_bytes > self.device_bytes:
            raise QuotaExceeded(
                f"the activations of device {device} would have {held + num_bytes} bytes in the cloud's cache; "
                f"allowed: {self.device_bytes}. Use a smaller wire format, cut where less crosses, or start the server "
                "with a larger --device-cache-mb"
            )
        if self._held + num_bytes > self._all_bytes:
            raise QuotaExceeded(
                f"the cloud's cache has {self._held} of {self._all_bytes} bytes; there is no place for {num_bytes} "
                "more. Start the server with a larger --cache-mb"
            )
        self._held += num_bytes

    def give_back(self, num_bytes: int) -> None:
        self._held -= num_bytes


class DeviceRows:
    """The rows of one device in one job."""

    def __init__(self, path: Path, device: str, quota: CacheQuota) -> None:
        """Open the file, or create it; raises OSError and QuotaExceeded."""
        self._device, self._quota = device, quota
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._places: dict[bytes, tuple[int, int]] = {}  # offset and length of the content
        self._end = self._scan()
        quota.take(device, 0, self._end)

    @property
    def held_bytes(self) -> int:
        return self._end

    def lacks(self, keys: np.ndarray[Any, Any]) -> list[int]:
        """Return the positions of keys, uint8 (N, KEY_BYTES), that are not here."""
        return [at for at, key in enumerate(keys) if key.tobytes() not in self._places]

    def add(self, key: bytes, content: memoryview) -> None:
        """Keep a row; raises ProtocolError for one that cannot be used, and QuotaExceeded."""
        if key in self._places:
            return
        parse_row(content)
        self._quota.take(self._device, self._end, _HEAD_BYTES + len(content))
        record = key + _LENGTH.pack(len(content)) + content
        os.pwrite(self._file, record, self._end)
        self._places[key] = self._end + _HEAD_BYTES, len(content)
        self._end += len(record)

    def row(self, key: bytes) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return a row's values and targets; raises ProtocolError for a key that is not here."""
        if key not in self._places:
            raise ProtocolError("a step names a sample whose activations were not sent; send `wanted` first")
        offset, length = self._places[key]
        return parse_row(memoryview(os.pread(self._file, length, offset)))

    def close(self) -> None:
        """Close the file; the rows stay."""
        self._quota.give_back(self._end)
        os.close(self._file)

    def _scan(self) -> int:
        """Find the complete records; return where they end."""
        size, at = os.fstat(self._file).st_size, 0
        while at + _HEAD_BYTES <= size:
            head = os.pread(self._file, _HEAD_BYTES, at)
            length = _LENGTH.unpack(head[KEY_BYTES:])[0]
            if at + _HEAD_BYTES + length > size:
                break
            self._places[head[:KEY_BYTES]] = at + _HEAD_BYTES, length
            at += _HEAD_BYTES + length
        os.ftruncate(self._file, at)
        return at


def rows_in(section: memoryview) -> Iterator[memoryview]:
    """Yield the contents of rows that were sent together; raises ProtocolError."""
    at = 0
    while at < len(section):
        start = at
        for _ in range(2):
            if at + _LENGTH.size > len(section):
                raise ProtocolError("rows end within the length of one")
            at += _LENGTH.size + _LENGTH.unpack(section[at : at + _LENGTH.size])[0]
        if at > len(section):
            raise ProtocolError(f"rows end {at - len(section)} bytes too early")
        yield section[start:at]


def parse_row(content: memoryview) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return a row's values and targets; raises ProtocolError, also for values that are not finite."""
    found, at = [], 0
    for _ in range(2):
        length = _LENGTH.unpack(content[at : at + _LENGTH.size])[0] if at + _LENGTH.size <= len(content) else -1
        if length < 0 or at + _LENGTH.size + length > len(content):
            raise ProtocolError("a row ends too early")
        found.append(wire.decode(content[at + _LENGTH.size : at + _LENGTH.size + length]))
        at += _LENGTH.size + length
    for name, one in found[0].items():
        if one.dtype.kind == "f" and not np.isfinite(one).all():
            raise ProtocolError(f"tensor {name!r} {one.dtype}{list(one.shape)} is not finite")
    return found[0], found[1]
