"""The link between a device and the cloud, as a plan sees it: two rates and a round trip."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from edgefl.errors import ConfigError

_RATE = re.compile(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)")
_TIME = re.compile(r"(\d+(?:\.\d+)?)(ms|s)")
_MBPS = {"kbit": 1e-3, "mbit": 1.0, "gbit": 1e3}
_MS = {"ms": 1.0, "s": 1e3}


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkSpeed:
    """What a link carries. Loss and retransmission are not modelled: give the rate that is left of them."""

    up_mbps: float  # megabits/s from the device
    down_mbps: float  # megabits/s to the device
    rtt_ms: float

    def __post_init__(self) -> None:
        if not (0 < self.up_mbps < math.inf and 0 < self.down_mbps < math.inf and 0 <= self.rtt_ms < math.inf):
            raise ConfigError(f"a link needs rates above 0 and a round trip of 0 or more, got {self}")

    def upload_ms(self, num_bytes: float) -> float:
        """Milliseconds to send this much, without the round trip."""
        return 8 * num_bytes / (self.up_mbps * 1e3)

    def download_ms(self, num_bytes: float) -> float:
        """Milliseconds to receive this much, without the round trip."""
        return 8 * num_bytes / (self.down_mbps * 1e3)


def parse_link(text: str) -> LinkSpeed:
    """Return the link of `20mbit,30ms`, or of `20mbit/100mbit,30ms` with another rate down; raises ConfigError."""
    rates, _, rtt = text.replace(" ", "").lower().partition(",")
    up, _, down = rates.partition("/")
    found = [_RATE.fullmatch(one) for one in (up, down or up)]
    rtt_ms = _TIME.fullmatch(rtt) if rtt else _TIME.fullmatch("0ms")
    if found[0] is None or found[1] is None or rtt_ms is None:
        raise ConfigError(
            f"--link {text!r} is not RATE,ROUNDTRIP such as 20mbit,30ms, or UP/DOWN,ROUNDTRIP such as "
            "5mbit/50mbit,0.1s; rates in kbit, mbit or gbit a second, times in ms or s"
        )
    up_mbps, down_mbps = (float(one[1]) * _MBPS[one[2]] for one in found if one is not None)
    return LinkSpeed(up_mbps=up_mbps, down_mbps=down_mbps, rtt_ms=float(rtt_ms[1]) * _MS[rtt_ms[2]])
