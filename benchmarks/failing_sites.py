"""Sites that fail and come back, in virtual time: how much of their time becomes part of a model.

Each site is up and down in turn, for exponentially distributed times from a fixed seed; a site that goes down loses the
training of its round. The rounds, the guard, the exchange and the clock are edgefl's; training is replaced by its
duration, because goodput does not depend on what is learned.

    goodput = updates per second that became part of a model / (fraction of the time that sites are up
              * updates per second of the same sites without failures, when each is waited for)

So 1.0 loses nothing but the time in which sites are down: no training that was cut off, no waiting for the lost, no
waiting of those that came back in the middle of a round.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgefl.aggregation.server_opt import ServerOptimizer
from edgefl.config import JobConfig, RoundsConfig
from edgefl.errors import QuorumNotMet
from edgefl.records import Answer, Plan, Traffic, Update
from edgefl.rounds import Job, run_rounds
from edgefl.settings.server import ServerConfig
from edgefl.simulation.world.clock import VirtualClock, VirtualFleet
from edgefl.simulation.world.devices import Devices, DevicesConfig
from edgefl.simulation.world.draws import Spread
from edgefl.simulation.world.names import Names

MARGIN = 4.0  # of virtual time, over that of rounds without failures
START = {"w": np.zeros(1, np.float32)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sites:
    """Some sites of one job."""

    count: int = 8
    training_s: float = 60.0  # of a round, without its delay
    delay_s: float = 1.0  # standard deviation of what a round takes longer
    up_s: float = 2400.0  # mean
    down_s: float = 600.0  # mean; 0 = they never fail
    noticed_s: float = 0.0  # how long after a failure it is known
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Work:
    """What became of a run."""

    updates: int
    seconds: float
    up_share: float  # of the sites' time
    longest_s: float  # of a round

    @property
    def rate(self) -> float:
        return self.updates / self.seconds


class Echo:
    """An engine whose training takes no real time."""

    def __init__(self, names: Names) -> None:
        self._names = names

    def clients(self) -> Sequence[str]:
        return list(self._names)

    def collect(self, plan: Plan) -> Iterator[Answer]:
        for client in plan.clients:
            yield Update(job=plan.job, round=plan.round, device=client, tree=START, weight=1.0)

    def traffic(self) -> Traffic:
        return Traffic()


def goodput(sites: Sites, rounds: RoundsConfig) -> tuple[float, Work]:
    """Return the goodput of these sites, and what they did."""
    never = Sites(count=sites.count, training_s=sites.training_s, delay_s=sites.delay_s, down_s=0.0, seed=sites.seed)
    ideal = run(never, RoundsConfig(count=rounds.count, quorum=sites.count, evaluate_every=0))
    work = run(sites, rounds)
    return work.rate / (work.up_share * ideal.rate), work


def run(sites: Sites, rounds: RoundsConfig) -> Work:
    """Run a job on these sites, in virtual time; a round without its quorum is repeated, at the cost of its time."""
    names, clock = Names(sites.count), VirtualClock()
    period_s = MARGIN * rounds.count * sites.training_s
    windows = list(_windows(sites, period_s))
    fleet = VirtualFleet(
        Echo(names),
        _devices(sites, names, windows, period_s),
        clock,
        rounds=rounds,
        num_samples=lambda _client: 1,
        noticed_s=sites.noticed_s,
    )
    updates, ends_s = 0, [0.0]
    while len(ends_s) <= rounds.count:
        step = ServerOptimizer(ServerConfig(), gradient=False)
        job = Job(id="job", config=JobConfig(rounds=rounds), step=step, clock=clock, on_refusal=fleet.refuse,
                  first_round=len(ends_s))  # fmt: skip
        with contextlib.suppress(QuorumNotMet):
            for outcome in run_rounds(job, fleet, START):
                updates += len(outcome.admitted) + len(outcome.late)
                ends_s.append(clock())
    up_s = sum(max(0.0, min(end, clock()) - start) for site in windows for start, end in site)
    return Work(updates, clock(), up_s / sites.count / clock(), float(np.max(np.diff(ends_s))))


def _devices(sites: Sites, names: Names, windows: list[list[tuple[float, float]]], period_s: float) -> Devices:
    """Return the sites as devices, with a trace of when they are up."""
    availability = dataclasses.replace(DevicesConfig().availability, period_s=period_s)
    delay_s = Spread(kind="lognormal", mean=sites.delay_s, std=sites.delay_s)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "sites.jsonl"
        lines = [json.dumps({"speed": 1 / sites.training_s, "available": one}) for one in windows]
        trace.write_text("\n".join(lines), encoding="utf-8")
        config = DevicesConfig(trace=str(trace), delay_s=delay_s, availability=availability)
        return Devices(config, names, sites.seed)


def _windows(sites: Sites, period_s: float) -> Iterator[list[tuple[float, float]]]:
    """Yield for each site when it is up."""
    rng = np.random.default_rng(sites.seed)
    for _ in range(sites.count):
        yield list(_up(rng, sites, period_s)) if sites.down_s else [(0.0, period_s)]


def _up(rng: np.random.Generator, sites: Sites, period_s: float) -> Iterator[tuple[float, float]]:
    is_up = rng.random() < sites.up_s / (sites.up_s + sites.down_s)
    now_s = 0.0 if is_up else float(rng.exponential(sites.down_s))
    while now_s < period_s:
        end_s = now_s + float(rng.exponential(sites.up_s))
        yield now_s, min(end_s, period_s)
        now_s = end_s + float(rng.exponential(sites.down_s))
