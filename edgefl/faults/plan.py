"""What goes wrong in a simulation, and when: a list of faults and a job, drawn from the seed before it begins.

The list is data: a failing seed is shrunk by leaving faults out (`edgefl.faults.shrink`).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgefl.faults.fleet import CLOUD, TOPOLOGIES, Topology

HORIZON_S = 9.0  # faults begin before it
MAX_FAULTS = 10
DEADLINE_S = 400.0  # of a round: far beyond what heals a fleet after its last fault
LONGEST_CUT_S, LONGEST_DOWN_S = 30.0, 8.0
APART = 0.2  # of the seeds with regions
REGIONAL = 0.25  # of the seeds with regions and FedAvg
GONE_S = 250.0  # how long a region is away; its devices have another parent by then


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One thing that goes wrong."""

    at_s: float
    kind: str
    node: str
    other: str = ""  # the other end of a link, or the new parents
    for_s: float = 0.0  # how long; of a clock, how far it jumps
    number: int = 0  # of the commit, from the fault's time on


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What one seed runs."""

    seed: int
    topology: str
    rounds: int
    algorithm: str
    quorum: int
    grace: float | str
    offline_grace_s: float
    server_lr: float
    region_rounds: int
    faults: tuple[Fault, ...]

    @property
    def fleet(self) -> Topology:
        return TOPOLOGIES[self.topology]

    @property
    def waits_for_all(self) -> bool:
        """Whether only a device that is offline for long is not waited for."""
        return self.grace == "none"

    @property
    def keeps_parents(self) -> bool:
        """Whether no device changes its parent, and no region is asked again because a sum was given up."""
        return self.topology != "region below a region" and not any(
            one.kind in {"assign", "gone", "apart"} for one in self.faults
        )

    def without(self, faults: Sequence[Fault]) -> Settings:
        """Return the same run with other faults."""
        return dataclasses.replace(self, faults=tuple(faults))

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return dataclasses.asdict(self)


def draw(seed: int, topologies: Sequence[str] = tuple(TOPOLOGIES)) -> Settings:
    """Return what a seed runs."""
    chance = random.Random(f"{seed}/plan")
    topology = TOPOLOGIES[topologies[seed % len(topologies)]]
    count = len(topology.devices)
    graces: list[float | str] = ["none", "none", 2.0, "auto"]
    settings = Settings(
        seed=seed,
        topology=topology.name,
        rounds=chance.choice([2, 2, 3, 4]),
        algorithm=chance.choice(["fedavg", "fedavg", "fedsgd"]),
        quorum=chance.choice([count, max(1, count - 1), 1]),
        grace=chance.choice(graces),
        offline_grace_s=chance.choice([5.0, 60.0]),
        server_lr=chance.choice([1.0, 0.5]),
        region_rounds=1,
        faults=(),
    )
    settings = _with_regional_rounds(random.Random(f"{seed}/regional"), settings)
    faults = [_fault(chance, topology) for _ in range(chance.randint(0, MAX_FAULTS))]
    if settings.region_rounds > 1:  # a round whose only device is given to the cloud cannot end well
        faults = [
            dataclasses.replace(one, other=_regions_of(one.other)) if one.kind == "assign" else one for one in faults
        ]
    if not any(one.kind == "gone" for one in faults):  # one after the other, both outlast a round's deadline
        faults += _apart(random.Random(f"{seed}/apart"), topology)
    return settings.without(sorted(faults, key=lambda one: one.at_s))


def _with_regional_rounds(chance: random.Random, settings: Settings) -> Settings:
    """Return the settings, at times with several rounds in each region for one of the cloud.

    Devices without a region are not used then, so no more than one can be asked for.
    """
    if not settings.fleet.regions or settings.algorithm != "fedavg" or chance.random() > REGIONAL:
        return settings
    return dataclasses.replace(settings, region_rounds=chance.choice([2, 2, 3]), quorum=1)


def _fault(chance: random.Random, topology: Topology) -> Fault:
    at_s = round(chance.random() * HORIZON_S, 3)
    kind = chance.choices(list(_KINDS), list(_KINDS.values()))[0]
    node = chance.choice([*topology.servers, *topology.devices, *topology.servers, CLOUD])
    down_s = round(chance.random() ** 2 * LONGEST_DOWN_S + 0.05, 3)
    other, number = "", 0
    if kind in {"cut", "break"}:
        node = chance.choice([*topology.regions, *topology.devices])
        other = topology.regions.get(node) or topology.devices[node]
        down_s = round(chance.random() ** 2 * LONGEST_CUT_S, 3) if kind == "cut" else 0.0
    elif kind == "assign":
        node, down_s = chance.choice(list(topology.devices)), 0.0
        other = ",".join(chance.sample(topology.servers, min(2, len(topology.servers))))
    elif kind == "gone":
        if topology.regions:
            node, down_s = chance.choice(list(topology.regions)), GONE_S
        else:
            kind = "kill"
    elif kind == "full":
        node = chance.choice(topology.servers)
    elif kind == "clock":
        down_s = round(chance.uniform(-3600, 3600), 1)
    elif kind.endswith("commit"):
        number = chance.randint(1, 8)
    return Fault(at_s=at_s, kind=kind, node=node, other=other, for_s=down_s, number=number)


def _regions_of(parents: str) -> str:
    return ",".join(one for one in parents.split(",") if one != CLOUD)


def _apart(chance: random.Random, topology: Topology) -> list[Fault]:
    """Return, at times, a region that is cut off with an update whose device does not know it, and goes elsewhere."""
    below = {
        region: [one for one, parent in topology.devices.items() if parent == region] for region in topology.regions
    }
    regions = [region for region, devices in below.items() if len(devices) > 1]
    if not regions or chance.random() > APART:
        return []
    region = chance.choice(regions)
    return [
        Fault(
            at_s=round(chance.random() * 2.0, 3), kind="apart", node=region, other=chance.choice(below[region]),
            for_s=GONE_S,
        )
    ]  # fmt: skip


_KINDS = {
    "kill": 4, "power": 1, "kill-before-commit": 3, "kill-after-commit": 3, "cut": 3, "break": 3, "pause": 2,
    "clock": 1, "full": 1, "assign": 2, "gone": 1,
}  # fmt: skip
