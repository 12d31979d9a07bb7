"""The machines of a population: speed, memory, links, delays; drawn by (seed, device) or read from a trace.

Invariant: a device's profile is always the same, and costs nothing until it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgefl.errors import ConfigError
from edgefl.simulation.world.availability import Availability, AvailabilityConfig, Battery, make_availability
from edgefl.simulation.world.draws import Floats, Indices, Spread, stream_key, uniform
from edgefl.simulation.world.trace import NUMBERS, TracedAvailability, TracedDevice, read_trace

CANDIDATES_FROM = 20_000  # from this number of devices on, candidates are drawn before their availability is checked

LEAST = 1e-3  # of a speed, memory or link: with 0, times would be infinite


@dataclass(frozen=True, kw_only=True, slots=True)
class DevicesConfig:
    """The devices' properties. Defaults: an average phone on a home network, always available."""

    speed: Spread = field(default_factory=lambda: Spread(mean=1000.0))  # samples/s, forward and backward
    memory_mb: Spread = field(default_factory=lambda: Spread(mean=4096.0))  # MB
    downlink_mbps: Spread = field(default_factory=lambda: Spread(mean=50.0))  # megabits/s
    uplink_mbps: Spread = field(default_factory=lambda: Spread(mean=10.0))  # megabits/s
    rtt_s: Spread = field(default_factory=lambda: Spread(mean=0.05))  # added to each download and upload
    delay_s: Spread = field(default_factory=Spread)  # before the training, drawn again in each round
    availability: AvailabilityConfig = field(default_factory=AvailabilityConfig)
    trace: str = ""  # a file of real devices; overrides the distributions

    def __post_init__(self) -> None:
        for name in NUMBERS:
            spread: Spread = getattr(self, name)
            if spread.kind == "constant" and spread.mean == 0 and spread.min == 0 and name != "rtt_s":
                raise ConfigError(f"population.devices.{name}.mean=0 must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedDevice:
    """The speed, memory and links of one client's machine."""

    speed: float  # samples/s
    memory_mb: float
    downlink_mbps: float
    uplink_mbps: float
    rtt_s: float

    def compute_s(self, num_trained: int) -> float:
        """Seconds of training on so many samples; a sample counts each time."""
        return num_trained / self.speed

    def download_s(self, num_bytes: int) -> float:
        """Seconds to download this much. Ignores loss and retransmission."""
        return self.rtt_s + 8 * num_bytes / (self.downlink_mbps * 1e6)

    def upload_s(self, num_bytes: int) -> float:
        """Seconds to upload this much. Ignores loss and retransmission."""
        return self.rtt_s + 8 * num_bytes / (self.uplink_mbps * 1e6)


class Devices:
    """The machines of a population's clients."""

    def __init__(self, config: DevicesConfig, names: Sequence[str], seed: int = 0) -> None:
        self.names = names
        self._config, self._seed = config, seed
        self._trace: tuple[TracedDevice, ...] = ()
        self._availability: Availability = make_availability(config.availability, seed)
        if config.trace:
            period_s = config.availability.period_s
            self._trace = read_trace(Path(config.trace), period_s)
            if any(device.windows is not None for device in self._trace):
                self._availability = TracedAvailability(self._trace, period_s)

    def device(self, client: str) -> SimulatedDevice:
        """Return a client's machine."""
        index = self.names.index(client)
        traced = self._trace[index % len(self._trace)].numbers if self._trace else {}
        return SimulatedDevice(
            **{name: traced[name] if name in traced else self._draw(name, index) for name in NUMBERS}
        )

    def delay_s(self, client: str, round_number: int) -> float:
        """Return a client's delay in this round before it trains."""
        spread = self._config.delay_s
        if spread.kind == "constant":
            return spread.quantile(0.5)
        return spread.quantile(uniform(self.names.index(client), self._seed, "delay", round_number))

    def drops_out(self, client: str, round_number: int) -> float | None:
        """Return the fraction of its work after which a client goes offline in this round; None if it does not."""
        dropout = self._config.availability.dropout
        if dropout == 0:
            return None
        draw = uniform(self.names.index(client), self._seed, "drop-out", round_number)
        return draw / dropout if draw < dropout else None

    def until_s(self, client: str, now_s: float) -> float:
        """Return when an available client becomes unavailable."""
        return self._availability.until_s(self.names.index(client), now_s)

    def spend(self, client: str, start_s: float, training_s: float) -> None:
        """Record that a client trained, which drains its battery."""
        self._availability.spend(self.names.index(client), start_s, training_s)

    def spent(self) -> Floats:
        """Return the batteries' state, (devices, 3), for a checkpoint; all else follows from the seed."""
        battery = self._availability
        return battery.spent() if isinstance(battery, Battery) else np.zeros((0, 3))

    def load(self, spent: Floats) -> None:
        """Restore the state that `spent` returned."""
        if isinstance(self._availability, Battery):
            self._availability.load(spent)

    def available(self, now_s: float, *, wanted: int, round_number: int) -> list[str]:
        """Return clients that are available now, sorted: all of them, or, of very many, `wanted` random ones.

        The draw is seeded by (seed, round); `wanted` 0 means all. The cost depends only on the size of the draw.
        """
        if not wanted or len(self.names) < CANDIDATES_FROM:
            chosen = self._there(np.arange(len(self.names)), now_s)
        else:
            chosen = self._by_lot(now_s, wanted, round_number)
        return [self.names[index] for index in chosen.tolist()]

    def _there(self, indices: Indices, now_s: float) -> Indices:
        return np.asarray(indices[self._availability.available(indices, now_s)])

    def _by_lot(self, now_s: float, wanted: int, round_number: int) -> Indices:
        """Draw more and more candidates until enough are available."""
        total, asked = len(self.names), 2 * wanted
        while True:
            rng = np.random.default_rng(stream_key(self._seed, "candidates", round_number, asked))
            drawn = rng.permutation(total) if asked >= total else rng.choice(total, asked, replace=False)
            there = self._there(drawn, now_s)
            if len(there) >= wanted or asked >= total:
                return np.sort(there[:wanted])
            asked *= 4

    def _draw(self, name: str, index: int) -> float:
        spread: Spread = getattr(self._config, name)
        value = spread.quantile(0.5 if spread.kind == "constant" else uniform(index, self._seed, name))
        return value if name == "rtt_s" else max(value, LEAST)
