"""Regions in a simulation: which clients are below which region, regional rounds, and what each tier's links carry.

The client with index i is in region i // fan_out[0]; this region in region i // (fan_out[0] * fan_out[1]) of the tier
above, and so on. The regions of the highest tier are below the cloud.
Invariant: with one regional round the result is that of the same clients without regions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgefl.aggregation import make_rule
from edgefl.aggregation.regional import change, regional_round, regional_step
from edgefl.aggregation.rule import Merging
from edgefl.config import JobConfig
from edgefl.errors import ConfigError, UpdateRejected
from edgefl.guards import RoundGuard
from edgefl.records import Answer, DeviceEvaluation, Evaluated, Evaluations, Failure, Partial, Plan, Traffic, Update
from edgefl.rounds import NO_EVALUATION, Fleet, MetricSums
from edgefl.settings.server import TiersConfig
from edgefl.simulation.engines.client_states import ClientStates, RoundBytes
from edgefl.simulation.world.schedule import Schedule
from edgefl.trees import EncodedTree, Tree, encoded_bytes, is_float, spec_of
from edgefl.trees.fragments import sent_part

MBIT_BYTES = 125_000


@dataclass(frozen=True, kw_only=True, slots=True)
class TierTraffic:
    """What the links between one tier and the tier above it have carried."""

    tier: int  # 0 = devices, 1 = the regions above them, ..; the links lead to the tier above, at last to the cloud
    regions: int  # that took part in the last round; in tier 0 the devices
    up_bytes: int
    down_bytes: int


class TierTree:
    """The regions above the clients, from below."""

    def __init__(self, config: TiersConfig, names: Sequence[str]) -> None:
        self._config = config
        self._position = {name: index for index, name in enumerate(names)}
        self._sizes = np.cumprod(config.fan_out, dtype=np.int64).tolist()  # clients in a region of each tier

    def regions(self, clients: Iterable[str], tier: int = 0) -> dict[int, list[str]]:
        """Return the regions of a tier (0 = the lowest) with their clients, in order."""
        found: dict[int, list[str]] = {}
        for client in clients:
            found.setdefault(self._position[client] // self._sizes[tier], []).append(client)
        return found

    def counts(self, clients: Collection[str]) -> list[int]:
        """Return how many senders each tier has: the clients, and the regions of every tier above them."""
        return [len(clients), *(len(self.regions(clients, tier)) for tier in range(len(self._sizes)))]

    def delayed(self, schedule: Schedule, start_s: float, model_bytes: int, sum_bytes: int) -> Schedule:
        """Return when the answers reach the cloud.

        A sum leaves its region when the last of its clients is in it, and early enough for the deadline, without those
        that are too late for that.
        """
        times = self._times()
        tiers = range(len(self._sizes))
        downs_s = [self._transfer_s(self._config.downlink_mbps, tier, model_bytes) for tier in tiers]
        ups_s = [times[tier + 1] * self._transfer_s(self._config.uplink_mbps, tier, sum_bytes) for tier in tiers]
        down_s = sum(many * one for many, one in zip(times[1:], downs_s, strict=True))
        ready = {name: start_s + down_s + times[0] * (at_s - start_s) for name, at_s in schedule.arrivals.items()}
        arrivals = {name: at_s for name, at_s in ready.items() if at_s + sum(ups_s) <= schedule.end_s}
        for tier, up_s in enumerate(ups_s):
            for clients in self.regions(arrivals, tier).values():
                arrivals |= dict.fromkeys(clients, max(arrivals[one] for one in clients) + up_s)
        late = tuple(name for name in ready if name not in arrivals)
        soonest = sorted(arrivals.items(), key=lambda one: (one[1], one[0]))
        return dataclasses.replace(schedule, arrivals=dict(soonest), late=(*schedule.late, *late))

    def regional(self, clients: Iterable[str]) -> list[list[str]]:
        """Return the clients of each region directly below the cloud: these run the regional rounds."""
        return list(self.regions(clients, len(self._sizes) - 1).values())

    def _times(self) -> list[int]:
        """Return how often each tier sends in a round of the cloud: devices, regions, .., those below the cloud."""
        return [*[self._config.region_rounds] * len(self._sizes), 1]

    def _transfer_s(self, mbps: Sequence[float], tier: int, num_bytes: int) -> float:
        rtt_s = _of_tier(self._config.rtt_s, tier, 0.0)
        speed = _of_tier(mbps, tier, 0.0)
        return rtt_s + (num_bytes / (speed * MBIT_BYTES) if speed else 0.0)


def _of_tier(values: Sequence[float], tier: int, default: float) -> float:
    return values[min(tier, len(values) - 1)] if values else default


@dataclass(slots=True)
class TieredFleet:
    """An engine's clients below regions. `traffic` is what the cloud itself sends and receives."""

    inner: Fleet
    tree: TierTree
    region_rounds: int = 1
    rule: str = "mean"
    states: ClientStates | None = None
    links: list[TierTraffic] = field(default_factory=list)
    _traffic: Traffic = field(default_factory=Traffic)

    def clients(self) -> Sequence[str]:
        return self.inner.clients()

    def collect(self, plan: Plan) -> Iterator[Answer]:
        """Yield the answers of the plan's clients; with several regional rounds, one partial sum per region."""
        answered: list[str] = []
        sent: list[int] = []  # bytes of updates whose sizes differ
        answers = self._regional(plan) if self.region_rounds > 1 and plan.fit else self.inner.collect(plan)
        try:
            for answer in answers:
                if not isinstance(answer, Failure):
                    answered += answer.contributors if isinstance(answer, Partial) else (answer.device,)
                if isinstance(answer, Update) and isinstance(answer.tree, EncodedTree):
                    sent.append(encoded_bytes(answer.tree))
                yield answer
        finally:
            self._count(plan, answered, sum(sent) // len(sent) if sent else RoundBytes(plan).up)

    def traffic(self) -> Traffic:
        return self._traffic

    def delayed(self, schedule: Schedule, plan: Plan, start_s: float) -> Schedule:
        """Return a round's schedule with the time that the regions' links take."""
        moved = RoundBytes(plan)
        return self.tree.delayed(schedule, start_s, moved.whole, _sum_bytes(plan, moved.exact_up))

    def _count(self, plan: Plan, answered: list[str], update_bytes: int) -> None:
        """Count what the links carried; sums of adapters at most, as wholes."""
        moved = RoundBytes(plan, self.states)
        down_bytes, up_bytes = moved.whole, update_bytes if plan.fit else 0
        sum_bytes = _sum_bytes(plan, moved.exact_up if plan.fit else 0)
        asked, sent = self.tree.counts(plan.clients), self.tree.counts(answered)
        none = [TierTraffic(tier=tier, regions=0, up_bytes=0, down_bytes=0) for tier in range(len(asked))]
        times = [*[self.region_rounds] * (len(asked) - 1), 1]
        each = [up_bytes, *[sum_bytes] * (len(asked) - 1)]
        self.links = [
            TierTraffic(
                tier=tier,
                regions=asked[tier],
                up_bytes=old.up_bytes + sent[tier] * times[tier] * each[tier],
                down_bytes=old.down_bytes
                + times[tier] * (asked[tier] * down_bytes if tier else moved.down_all(plan.clients)),
            )
            for tier, old in enumerate(self.links or none)
        ]
        self._traffic = Traffic(up_bytes=self.links[-1].up_bytes, down_bytes=self.links[-1].down_bytes)

    def _regional(self, plan: Plan) -> Iterator[Answer]:
        for clients in self.tree.regional(plan.clients):
            yield from self._in_region(plan, tuple(clients))

    def _in_region(self, plan: Plan, clients: tuple[str, ...]) -> Iterator[Answer]:
        """Run the rounds of one region, and yield its sum, and those that failed in the last of them."""
        parameters: Tree = plan.parameters
        for number in range(self.region_rounds):
            last = number == self.region_rounds - 1
            asked = dataclasses.replace(
                plan, clients=clients, parameters=parameters, evaluate=plan.evaluate and number == 0,
                round=regional_round(plan.round, number, self.region_rounds),
            )  # fmt: skip
            fold = _Fold(asked, self.rule)
            for answer in self.inner.collect(asked):
                if (failure := fold.add(answer)) is not None and last:
                    yield dataclasses.replace(failure, round=plan.round)
            if number == 0:
                evaluations, each = fold.evaluations, fold.each
            if fold.weight:
                parameters = regional_step(parameters, fold.mean())
        if fold.weight:
            moved = change(plan.parameters, parameters)
            total = {name: array * fold.weight for name, array in moved.items()}
            yield Partial(
                total=total, weight=fold.weight, contributors=tuple(fold.contributors), metrics=fold.metrics.sums,
                evaluations=evaluations, device_evaluations=each,
            )  # fmt: skip


class _Fold:
    """The sum of one regional round."""

    def __init__(self, plan: Plan, rule: str) -> None:
        made = make_rule(rule, plan.parameters)
        if not isinstance(made, Merging):
            raise ConfigError(f"aggregation.rule={rule!r} does not merge sums of regions; drop [tiers]")
        self._guard, self._rule, self._plan = RoundGuard(plan), made, plan
        self.weight = 0.0
        self.contributors: list[str] = []
        self.metrics = MetricSums()
        self.evaluations: Evaluations | None = None
        self.each: dict[str, DeviceEvaluation] = {}

    def add(self, answer: Answer) -> Failure | None:
        """Fold an answer; return why a client is not in the sum."""
        if isinstance(answer, Failure):
            return answer
        try:
            if isinstance(answer, Partial):
                self._guard.admit_partial(answer)
                self._rule.merge(answer)
                self.contributors += answer.contributors
                self.metrics.merge(answer.metrics)
                self.evaluations = answer.evaluations
            elif isinstance(answer, Update):
                self._add_update(answer)
        except UpdateRejected as refusal:
            plan = self._plan
            return Failure(job=plan.job, round=plan.round, device=refusal.device, reason=refusal.reason, refused=True)
        self.weight += 0.0 if isinstance(answer, Evaluated) else answer.weight
        return None

    def mean(self) -> Tree:
        return self._rule.result()

    def _add_update(self, update: Update) -> None:
        self._guard.admit(update)
        self._rule.add(update)
        self.contributors.append(update.device)
        self.metrics.add(update.weight, update.metrics)
        if self._plan.evaluate:
            self.each[update.device] = update.evaluation or NO_EVALUATION


def _sum_bytes(plan: Plan, update_bytes: int) -> int:
    """Return the bytes of a partial sum: float32 for tensors of at most 32 bits, float64 for others."""
    more = sum(
        one.size * ((4 if is_float(one.dtype) and one.dtype.itemsize <= 4 else 8) - one.dtype.itemsize)
        for one in spec_of(sent_part(plan.parameters, plan.train)).values()
    )
    return update_bytes + more if update_bytes else 0


def below_regions(
    inner: Fleet, config: JobConfig, names: Sequence[str], states: ClientStates | None = None
) -> TieredFleet | None:
    """Put an engine's clients below the configured regions; None without any. Raises ConfigError."""
    if config.tiers.region_rounds > 1 and not config.tiers.fan_out:
        raise ConfigError(
            f"tiers.region_rounds={config.tiers.region_rounds} needs regions; a simulation has those of tiers.fan_out, "
            "such as `--set tiers.fan_out=[10]`: ten clients in a region"
        )
    if not config.tiers.fan_out:
        return None
    tree, times = TierTree(config.tiers, names), config.tiers.region_rounds
    return TieredFleet(inner, tree, times, config.aggregation.rule, states)


def tier_links(links: Sequence[TierTraffic]) -> list[Mapping[str, int]]:
    """Return the traffic of all tiers as JSON data."""
    return [dataclasses.asdict(one) for one in links]
