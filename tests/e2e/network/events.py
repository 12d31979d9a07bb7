"""A schedule of faults, drawn from a seed, and what each does to a fleet."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.e2e.network.fleet import AGENTS, REGIONS, NetworkFleet

CALM_LOSS, BURST_LOSS = 0.005, 0.3  # the probability that a cable loses a frame
MOST_AT_ONCE = 5  # events, before the fleet is let finish a round
LONGEST_PAUSE_S = 1.0
SHORTEST_CUT_S, LONGEST_CUT_S = 0.2, 3.0
PARENT_LISTS = (["cloud"], ["r1", "r2", "cloud"], ["r2", "r1"], ["r2", "cloud"], ["r1"], ["cloud", "r2", "r1"])
SHARES = {"kill cloud": 10, "kill region": 18, "kill agent": 20, "kill broker": 7, "kill trainer": 17, "cut": 16,
          "loss": 7, "move": 5}  # fmt: skip
WITH_CABLE = ("cloud", "broker", *REGIONS, *AGENTS)


@dataclass(frozen=True)
class Event:
    """One fault: what happens to which machine, and how long after the fault before."""

    kind: str
    target: str
    pause_s: float
    lasts_s: float = 0.0  # of a cable
    parents: tuple[str, ...] = ()  # of a device that is moved

    def __str__(self) -> str:
        return f"{self.kind} {self.target} {','.join(self.parents) or f'{self.lasts_s:.1f} s'}"


def draw(count: int, seed: int) -> list[list[Event]]:
    """Return so many events, in bursts; each kind is among the first ones."""
    chance = random.Random(seed)
    kinds = list(SHARES)
    chance.shuffle(kinds)
    kinds += chance.choices(list(SHARES), list(SHARES.values()), k=max(0, count - len(kinds)))
    left, bursts = [_drawn(kind, chance) for kind in kinds[:count]], []
    while left:
        size = chance.randint(1, MOST_AT_ONCE)
        bursts.append(left[:size])
        left = left[size:]
    return bursts


def _drawn(kind: str, chance: random.Random) -> Event:
    targets = {"kill cloud": ["cloud"], "kill broker": ["broker"], "kill region": REGIONS, "cut": WITH_CABLE,
               "loss": WITH_CABLE}.get(kind, AGENTS)  # fmt: skip
    return Event(
        kind, chance.choice(targets), chance.uniform(0, LONGEST_PAUSE_S),
        chance.uniform(SHORTEST_CUT_S, LONGEST_CUT_S) if kind in {"cut", "loss"} else 0.0,
        tuple(chance.choice(PARENT_LISTS)) if kind == "move" else (),
    )  # fmt: skip


class Storm:
    """Does events to a fleet, one after the other; a bad cable heals by itself meanwhile."""

    def __init__(self, fleet: NetworkFleet) -> None:
        self._fleet = fleet
        self.done: list[Event] = []
        self.missed = 0  # events whose target was not there

    def do(self, event: Event) -> None:
        """Wait for the moment of the event, and do it."""
        time.sleep(event.pause_s)
        self.done.append(event)
        sys.stdout.write(f"{time.strftime('%H:%M:%S')} {event}\n")  # a failed test shows it
        fleet, name = self._fleet, event.target
        match event.kind:
            case "kill trainer":
                self.missed += not fleet.kill_trainer(name)
            case "cut":
                fleet.machines.set_link(name, cut=True, for_s=event.lasts_s)
            case "loss":
                fleet.machines.set_link(name, loss=BURST_LOSS, for_s=event.lasts_s)
            case "move":
                fleet.assign(name, list(event.parents))
            case _:
                fleet.kill(name)

    def wait_for(self, holds: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until a condition holds; False at the timeout."""
        end_s = time.monotonic() + timeout_s
        while not (held := holds()) and time.monotonic() < end_s:
            time.sleep(0.1)
        return held
