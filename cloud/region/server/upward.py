"""What a region passes on upward: what its devices, and the regions below it, say of themselves.

Everything is an entry of one mirror, of which only the latest value counts. Telemetry is passed on at intervals, so
that it costs the parent the same however often devices measure themselves.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from edgefl.errors import ProtocolError
from edgefl.process.log_tail import MAX_BYTES
from edgefl.protocols import tiers
from edgefl.protocols.messages import DeviceState, RolloutNote, Telemetry, encode
from edgefl.protocols.tiers import LogSent
from edgefl.protocols.tiers.mirror import Mirror

TELEMETRY_S = 10.0  # between two reports of telemetry: a third of the interval at which devices measure


class Upward:
    """The entries of one region. Methods may be called from any thread."""

    def __init__(self) -> None:
        self.mirror = Mirror()
        self.on_state: Callable[[], object] = lambda: None  # called when a device has said how it is
        self._lock = threading.Lock()
        self._telemetry: dict[str, bytes] = {}  # of the devices whose telemetry is new since the last report
        self._measured: set[str] = set()  # devices whose telemetry was passed on

    def note_state(self, device: str, state: DeviceState) -> None:
        """Pass on whether a device is online, and how it is."""
        self.on_state()
        self.mirror.set(f"state/{device}", encode(state))
        if not state.online:
            self._drop_telemetry(device)

    def note_lost(self, device: str, _state: DeviceState) -> None:
        """Say nothing of a device any more: the region below, or the broker, through which it was reached is lost."""
        self.on_state()
        self.mirror.delete(f"state/{device}")
        self._drop_telemetry(device)

    def note_rollout(self, device: str, note: RolloutNote) -> None:
        """Pass on how far a device is with a release."""
        self.mirror.set(f"note/{device}/{note.model}", encode(note))

    def note_telemetry(self, device: str, telemetry: Telemetry) -> None:
        """Keep a device's latest telemetry for the next report; its first one is passed on at once."""
        data = encode(telemetry)
        with self._lock:
            if device in self._measured:
                self._telemetry[device] = data
            else:
                self._measured.add(device)
                self.mirror.set(f"telemetry/{device}", data)

    def report_telemetry(self) -> None:
        """Pass on what is new since the last report."""
        with self._lock:
            new, self._telemetry = self._telemetry, {}
            for device, data in new.items():
                self.mirror.set(f"telemetry/{device}", data)

    async def run(self) -> None:
        """Report telemetry at intervals, until cancelled."""
        while True:
            await asyncio.sleep(TELEMETRY_S)
            self.report_telemetry()

    def note_serial(self, member: str, serial: str) -> None:
        """Pass on that a member uses its renewed certificate."""
        self.mirror.set(f"serial/{member}", serial.encode())

    def pass_on(self, key: str, value: bytes | None) -> None:
        """Pass on an entry of a region below; None = it is gone."""
        if value is None:
            self.mirror.delete(key)
        else:
            self.mirror.set(key, value)

    def receive(self, device: str, request: str, text: bytes, *, cut: bool) -> None:
        """Pass on the end of a device's log; raises ProtocolError above the size limit."""
        if len(text) > MAX_BYTES:
            raise ProtocolError(f"the log has {len(text)} bytes; at most {MAX_BYTES} are accepted")
        sent = LogSent(request=request, text=text.decode("utf-8", "replace"), cut=cut)
        self.mirror.set(f"log/{device}", tiers.pack(sent))

    def forget(self, device: str) -> None:
        """Say nothing more of a device that was removed, or may not connect here any more."""
        self.mirror.delete(f"state/{device}")
        self.mirror.replace(f"note/{device}/", {})
        self._drop_telemetry(device)

    def _drop_telemetry(self, device: str) -> None:
        with self._lock:
            self._telemetry.pop(device, None)
            self._measured.discard(device)
            self.mirror.delete(f"telemetry/{device}")
