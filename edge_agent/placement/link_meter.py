"""What a device knows of its link and of the load on both sides, from the requests that it sends anyway.

The round trip is the median of the last pings. What a request takes beyond that and beyond the server's own time is
spent on its bytes. The rate is the mean of bytes by the mean of these times, so a request counts by its bytes: one of a
few bytes says little about the rate. These means are running ones, of the first measurements by their number, then
exponential. A load is the median of the last measurements, because the first run of a part, or one in a busy moment,
takes ten times as long. No clock and no I/O.
"""

from __future__ import annotations

import statistics
from collections import deque

from edgefl.offload.plans.link import LinkSpeed

PINGS = 5
LOADS, EXPECTED = 7, (1.0, 1.0)  # measurements of a load; before any, it is as expected
WEIGHT = 0.2  # of a new measurement
_LEAST_MS = 0.05  # on bytes: less is noise
MOST_MBPS = 10_000.0


class LinkMeter:
    """Measurements of one link."""

    def __init__(self) -> None:
        self._pings_ms: deque[float] = deque(maxlen=PINGS)
        self._num_calls = 0
        self._bytes = self._on_bytes_ms = 0.0  # means
        self._device, self._cloud = deque(EXPECTED, LOADS), deque(EXPECTED, LOADS)

    def note_ping(self, rtt_ms: float) -> None:
        """Note the time of an empty call."""
        self._pings_ms.append(rtt_ms)

    def note_call(self, num_bytes: int, total_ms: float, server_ms: float) -> None:
        """Note a call: its bytes both ways, its time here, and how much of it the server says it took."""
        if not self._pings_ms:
            return
        on_bytes_ms = max(total_ms - server_ms - self._rtt_ms(), _LEAST_MS)
        self._num_calls += 1
        weight = max(WEIGHT, 1 / self._num_calls)
        self._bytes += weight * (num_bytes - self._bytes)
        self._on_bytes_ms += weight * (on_bytes_ms - self._on_bytes_ms)

    def note_device(self, took_ms: float, expected_ms: float) -> None:
        """Note how long the device's part took."""
        if expected_ms > 0:
            self._device.append(took_ms / expected_ms)

    def note_cloud(self, took_ms: float, expected_ms: float) -> None:
        """Note how long the server says that its part took, with waiting."""
        if expected_ms > 0:
            self._cloud.append(took_ms / expected_ms)

    @property
    def device_load(self) -> float:
        """How many times as long as expected the device's part takes."""
        return statistics.median(self._device)

    @property
    def cloud_load(self) -> float:
        """The same of the cloud's part."""
        return statistics.median(self._cloud)

    @property
    def link(self) -> LinkSpeed | None:
        """The link; None before anything was measured. Both ways are taken to be as fast."""
        if not self._num_calls:
            return None
        mbps = min(8 * max(1.0, self._bytes) / (self._on_bytes_ms * 1e3), MOST_MBPS)
        return LinkSpeed(up_mbps=mbps, down_mbps=mbps, rtt_ms=self._rtt_ms())

    def _rtt_ms(self) -> float:
        return statistics.median(self._pings_ms)

    def __str__(self) -> str:
        link = self.link
        return "" if link is None else f"{link.up_mbps:.3g} Mbit/s, {link.rtt_ms:.3g} ms"
