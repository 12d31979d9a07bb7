"""The settings of `[server]`, `[aggregation]` and `[tiers]`: what becomes of the updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgefl.terminal.bounds import (
    MAX_COUNT,
    MAX_RATE,
    MAX_SECONDS,
    require,
    require_above_zero,
    require_one_of,
    require_plain,
    require_printable,
    require_within,
)

MAX_TIERS = 8
MAX_FRAGMENTS = 1000
EXACT, BF16, INT8 = "exact", "bf16", "int8"  # forms of `edgefl.trees.narrow`
MODEL_WIRES = (EXACT, BF16)
UPDATE_WIRES = (EXACT, BF16, INT8)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """The server's step: a `torch.optim` optimizer over the aggregated update."""

    optimizer: str = "SGD"  # any name in `torch.optim`; plain SGD needs no torch
    lr: float = 1.0  # learning rate of the server's optimizer
    options: Mapping[str, Any] = field(default_factory=dict)  # other arguments of the optimizer, e.g. `momentum = 0.9`
    fragments: int = 1  # parts of the model, one of which is exchanged per round (Streaming DiLoCo); 1 = all of it
    wire: str = "exact"  # in which form the model goes to devices: exact | bf16 (half the bytes)

    def __post_init__(self) -> None:
        require_printable("server.optimizer", self.optimizer)
        require_above_zero("server.lr", self.lr, MAX_RATE)
        require_within("server.fragments", self.fragments, 1, MAX_FRAGMENTS)
        require_one_of("server.wire", self.wire, MODEL_WIRES)
        for name, value in self.options.items():
            require_plain(f"server.options.{name}", value)


@dataclass(frozen=True, kw_only=True, slots=True)
class AggregationConfig:
    """Which rule aggregates the updates."""

    rule: str = "mean"  # mean: weighted by the clients' numbers of samples

    def __post_init__(self) -> None:
        require_printable("aggregation.rule", self.rule)


@dataclass(frozen=True, kw_only=True, slots=True)
class TiersConfig:
    """Regions between the clients and the cloud. In a fleet they are those that run; the rest is for simulations."""

    region_rounds: int = 1  # rounds in each region below the cloud for one of the cloud (HierFAVG, Liu et al. 2020)
    fan_out: Sequence[int] = field(default_factory=list)  # simulated: clients per region, regions per region, ..
    uplink_mbps: Sequence[float] = field(default_factory=list)  # simulated: of each tier's regions, from below
    downlink_mbps: Sequence[float] = field(default_factory=list)  # the same
    rtt_s: Sequence[float] = field(default_factory=list)  # round-trip time of these links (s)

    def __post_init__(self) -> None:
        require_within("tiers.region_rounds", self.region_rounds, 1, 1000)
        require(len(self.fan_out) <= MAX_TIERS, f"tiers.fan_out has {len(self.fan_out)} tiers, at most {MAX_TIERS}")
        for number in self.fan_out:
            require_within("tiers.fan_out", number, 1, MAX_COUNT)
        for name in ("uplink_mbps", "downlink_mbps", "rtt_s"):
            values = getattr(self, name)
            require(
                len(values) <= max(1, len(self.fan_out)),
                f"tiers.{name} has {len(values)} values for {len(self.fan_out)} tiers of tiers.fan_out",
            )
            for value in values:
                require_within(f"tiers.{name}", value, 0 if name == "rtt_s" else 1e-6, MAX_SECONDS)
