"""Rounds: who is asked, when a round ends, what a lost device costs, and when the round is loud."""

from __future__ import annotations

import dataclasses
import itertools
import math
import traceback
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgefl import aggregation, rounds
from edgefl.aggregation import WeightedMean
from edgefl.aggregation.server_opt import ServerOptimizer
from edgefl.config import JobConfig, from_dict
from edgefl.errors import ConfigError, QuorumNotMet, StepFailed
from edgefl.records import Failure, Partial, Plan, RoundOutcome, Update
from edgefl.rounds import Job, run_rounds, select_clients
from edgefl.settings.server import ServerConfig
from edgefl.testing import ManualClock, ScriptedClient, ScriptedFleet, make_update
from edgefl.trees import Tree

OURS = Path(rounds.__file__).parent
START = {"w": np.zeros(2, np.float32)}


def config(**sections: Mapping[str, Any]) -> JobConfig:
    return from_dict(JobConfig, sections)


def job(settings: JobConfig, **changes: Any) -> Job:
    return Job(id="job", config=settings, step=ServerOptimizer(ServerConfig(), gradient=False), **changes)


def sends(device: str, w: float = 1.0, weight: float = 1.0, **metrics: float) -> ScriptedClient:
    return lambda plan: make_update(device, job=plan.job, round=plan.round, weight=weight, metrics=metrics, w=[w, w])


def moves(device: str, delta: Any) -> ScriptedClient:
    return lambda plan: make_update(device, job=plan.job, round=plan.round, w=delta)


def fails(device: str, reason: str = "no data") -> ScriptedClient:
    return lambda plan: Failure(job=plan.job, round=plan.round, device=device, reason=reason)


def silent(_plan: Plan) -> None:
    return None


def one_round(fleet: ScriptedFleet, settings: JobConfig, **changes: Any) -> RoundOutcome:
    return next(run_rounds(job(settings, **changes), fleet, START))


def test_two_rounds_by_hand() -> None:
    fleet = ScriptedFleet({"a": sends("a", 3.0, weight=1), "b": sends("b", 6.0, weight=2)})
    first, second = run_rounds(job(config(rounds={"count": 2})), fleet, START)
    assert first.parameters["w"].tolist() == [5.0, 5.0]  # (1*3 + 2*6) / 3
    assert second.parameters["w"].tolist() == [10.0, 10.0]
    assert (first.admitted, first.weight, first.round, second.round) == (("a", "b"), 3.0, 1, 2)
    assert fleet.plans[1].parameters is first.parameters


def test_traffic_and_time_are_the_rounds_own() -> None:
    clock = ManualClock()

    def slow(plan: Plan) -> Update:
        clock.advance(2.5)
        return make_update("a", round=plan.round, w=[1.0, 1.0])

    outcomes = list(run_rounds(job(config(rounds={"count": 2}), clock=clock), ScriptedFleet({"a": slow}), START))
    assert [(o.seconds, o.up_bytes, o.down_bytes) for o in outcomes] == [(2.5, 8, 8), (2.5, 8, 8)]


def test_metrics_are_weighted_by_those_who_sent_them() -> None:
    fleet = ScriptedFleet({
        "a": sends("a", weight=1, loss=1.0),
        "b": sends("b", weight=3, loss=2.0, accuracy=0.5),
    })  # fmt: skip
    assert one_round(fleet, config()).metrics == {"loss": 1.75, "accuracy": 0.5}


def test_one_device_lost_is_normal() -> None:
    fleet = ScriptedFleet({"a": sends("a", 2.0), "b": fails("b"), "c": silent})
    outcome = one_round(fleet, config())
    assert outcome.parameters["w"].tolist() == [2.0, 2.0]
    assert (outcome.admitted, outcome.failed, outcome.missing) == (("a",), {"b": "no data"}, ("c",))


def test_a_refused_update_is_reported_and_leaves_no_trace() -> None:
    heard: list[tuple[int, str, str]] = []

    def record(plan: Plan, update: Update, reason: str) -> None:
        heard.append((plan.round, update.device, reason))

    fleet = ScriptedFleet({"a": sends("a", math.nan), "b": sends("b", 2.0)})
    outcome = one_round(fleet, config(), on_refusal=record)
    assert outcome.parameters["w"].tolist() == [2.0, 2.0]
    assert (outcome.admitted, outcome.weight) == (("b",), 1.0)
    assert outcome.rejected == {"a": "tensor 'w' holds NaN or infinity"}
    assert heard == [(1, "a", "tensor 'w' holds NaN or infinity")]


def test_under_quorum_the_round_is_loud_and_says_every_reason() -> None:
    fleet = ScriptedFleet({"a": sends("a"), "b": fails("b"), "c": silent, "d": sends("d", math.inf)})
    with pytest.raises(QuorumNotMet) as refusal:
        one_round(fleet, config(rounds={"quorum": 2, "deadline_s": 9}))
    message = str(refusal.value)
    assert "round 1 of job job: 1 of 4 updates admitted, the quorum is 2" in message
    for reason in ("b: no data", "c: no answer within 9 s", "d: tensor 'w' holds NaN or infinity"):
        assert reason in message


def test_a_reason_of_many_clients_is_told_once() -> None:
    fleet = ScriptedFleet({name: fails(name) for name in ("b", "a", "c")})
    with pytest.raises(QuorumNotMet, match=r"\. a, b, c: no data$"):
        one_round(fleet, config())
    fleet = ScriptedFleet({name: fails(name, f"no {name}") for name in "abcdefgh"})
    with pytest.raises(QuorumNotMet, match=r"a: no a; .*; e: no e; and 3 more$"):
        one_round(fleet, config())


@pytest.mark.parametrize("answer", [fails("a"), silent, sends("a", math.nan)])
def test_a_federation_whose_every_client_fails_does_not_succeed(answer: ScriptedClient) -> None:
    with pytest.raises(QuorumNotMet):
        list(run_rounds(job(config()), ScriptedFleet({"a": answer}), START))


def test_too_few_clients_are_refused_before_anyone_is_asked() -> None:
    fleet = ScriptedFleet({"a": sends("a")})
    with pytest.raises(QuorumNotMet, match="1 clients are available, the quorum is 2"):
        one_round(fleet, config(rounds={"quorum": 2}))
    assert fleet.plans == []


def test_over_selection_asks_more_and_closes_early() -> None:
    fleet = ScriptedFleet({name: sends(name) for name in "abcdef"})
    outcome = one_round(fleet, config(rounds={"clients": 2, "over_selection": 0.5}))
    assert len(fleet.plans[0].clients) == 3
    assert len(outcome.admitted) == 2
    assert len(outcome.missing) == 1
    assert fleet.closed_early == 1


def test_over_selection_stands_in_for_a_lost_device() -> None:
    names = select_clients("abcdef", config(rounds={"clients": 2, "over_selection": 0.5}), 1)
    script = {name: fails(name) if name == names[0] else sends(name) for name in "abcdef"}
    outcome = one_round(ScriptedFleet(script), config(rounds={"clients": 2, "quorum": 2, "over_selection": 0.5}))
    assert len(outcome.admitted) == 2


@pytest.mark.parametrize(("clients", "over", "asked"), [(10, 0.1, 11), (100, 0.1, 110), (3, 0.5, 5), (4, 0.0, 4)])
def test_how_many_are_asked(clients: int, over: float, asked: int) -> None:
    available = [f"d{index:03}" for index in range(200)]
    settings = config(rounds={"clients": clients, "over_selection": over})
    assert len(select_clients(available, settings, 1)) == asked


def test_selection_depends_on_seed_and_round_alone() -> None:
    available = [f"d{index}" for index in range(50)]

    def draw(seed: int, number: int, order: Callable[[list[str]], list[str]] = list) -> tuple[str, ...]:
        settings = config(rounds={"clients": 5}, train={"seed": seed})
        return select_clients(order(available), settings, number)

    assert draw(0, 1) == draw(0, 1, lambda names: names[::-1])
    assert len({draw(seed, number) for seed in range(3) for number in range(3)}) == 9


def test_everyone_has_the_same_chance() -> None:
    settings = config(rounds={"clients": 2})
    drawn = [name for number in range(2000) for name in select_clients("abcde", settings, number)]
    shares = np.array([drawn.count(name) for name in "abcde"]) / 2000
    assert np.allclose(shares, 0.4, atol=0.05)


def test_the_order_of_arrival_does_not_matter() -> None:
    answers = {"a": sends("a", 0.1, weight=3), "b": sends("b", -7.0, weight=1), "c": sends("c", 1e4, weight=2)}
    results = []
    for order in itertools.permutations("abc"):
        script = dict(zip("abc", (answers[name] for name in order), strict=True))
        results.append(one_round(ScriptedFleet(script), config()).parameters["w"])
    assert all(np.allclose(result, results[0], rtol=1e-6, atol=0) for result in results)


def test_a_resumed_job_goes_on_with_its_round_and_cohort() -> None:
    fleet = ScriptedFleet({name: sends(name) for name in "abcd"})
    settings = config(rounds={"count": 4, "clients": 1})
    outcomes = list(run_rounds(job(settings, first_round=3, cohort=("b", "d")), fleet, START))
    assert [plan.round for plan in fleet.plans] == [3, 4]
    assert fleet.plans[0].clients == ("b", "d")
    assert len(fleet.plans[1].clients) == 1
    assert [outcome.round for outcome in outcomes] == [3, 4]


def test_a_resumed_job_equals_an_undisturbed_one() -> None:
    def fleet() -> ScriptedFleet:
        return ScriptedFleet({name: sends(name, w) for name, w in (("a", 1.0), ("b", 2.5))})

    settings = config(rounds={"count": 4})
    whole = list(run_rounds(job(settings), fleet(), START))
    half = list(itertools.islice(run_rounds(job(settings), fleet(), START), 2))
    rest = list(run_rounds(job(settings, first_round=3), fleet(), half[-1].parameters))
    assert rest[-1].parameters["w"].tolist() == whole[-1].parameters["w"].tolist()


def test_a_job_whose_rounds_are_over_asks_nobody() -> None:
    fleet = ScriptedFleet({"a": sends("a")})
    assert list(run_rounds(job(config(rounds={"count": 2}), first_round=3), fleet, START)) == []
    assert fleet.plans == []


def test_an_unknown_rule_is_refused_before_anyone_is_asked() -> None:
    fleet = ScriptedFleet({"a": sends("a")})
    with pytest.raises(ConfigError, match=r"aggregation\.rule='maen' is not one of: mean"):
        one_round(fleet, config(aggregation={"rule": "maen"}))
    assert fleet.plans == []


def test_a_batch_norm_counter_survives_rounds() -> None:
    """A 0-d integer stays an array of its dtype, round after round."""
    start = {"n": np.zeros((), np.int64)}

    def count(plan: Plan) -> Update:
        return make_update("a", round=plan.round, n=np.array(4, np.int64))

    outcomes = list(run_rounds(job(config(rounds={"count": 3})), ScriptedFleet({"a": count}), start))
    counter = outcomes[-1].parameters["n"]
    assert isinstance(counter, np.ndarray)
    assert (counter.dtype, counter.shape, int(counter)) == (np.dtype(np.int64), (), 12)


def part_of_a_fleet(fleet: ScriptedFleet, *partials: Partial) -> Any:
    """A fleet that first sends partial sums, then what is scripted."""

    class Mixed(ScriptedFleet):
        def collect(self, plan: Plan) -> Any:
            yield from partials
            yield from super().collect(plan)

    return Mixed(fleet.script)


def a_sum(total: float, *contributors: str, weight: float = 3.0, loss: float = 0.0) -> Partial:
    metrics = {"loss": (weight * loss, weight)}
    return Partial(total={"w": np.full(2, total)}, weight=weight, contributors=contributors, metrics=metrics)


class _Watched(Update):
    """An update whose end can be seen: it has room for weak references."""


def _fields(update: Update) -> dict[str, Any]:
    return {one.name: getattr(update, one.name) for one in dataclasses.fields(update)}


class Trusting(WeightedMean):
    """A mean that merges whatever it is given."""

    def merge(self, partial: Partial) -> None:
        self._sums.add(partial.total, 1.0, list(partial.total))
        self._weight += partial.weight


def test_between_a_jobs_rounds_and_the_averaging_line_are_two_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    stops: list[str] = []

    class Watched(WeightedMean):
        def add(self, update: Update) -> None:
            ours = [frame.name for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(OURS)]
            stops.extend(ours)
            super().add(update)

    monkeypatch.setitem(aggregation.RULES, "mean", Watched)
    one_round(ScriptedFleet({"a": sends("a", 1.0)}), config())
    assert stops == ["run_rounds", "run_round"]  # and then `add`, whose last line is the algorithm


def test_all_updates_are_let_go_before_the_step() -> None:
    seen: list[weakref.ref[Update]] = []

    def made(plan: Plan) -> Update:
        update = _Watched(**_fields(make_update("a", round=plan.round, w=[1.0, 1.0])))
        seen.append(weakref.ref(update))
        return update

    def keep(parameters: Tree) -> Tree:
        assert [one() for one in seen] == [None]
        return parameters

    one_round(ScriptedFleet({"a": made}), config(), keep=keep)
    assert len(seen) == 1


def test_a_partial_sum_stands_for_all_that_are_in_it() -> None:
    script = {"a": silent, "b": silent, "c": sends("c", 9.0, weight=1, loss=4.0)}
    fleet = part_of_a_fleet(ScriptedFleet(script), a_sum(15.0, "a", "b", loss=2.0))
    outcome = one_round(fleet, config())
    assert outcome.parameters["w"].tolist() == [6.0, 6.0]  # (15 + 1*9) / (3 + 1)
    assert (outcome.admitted, outcome.weight, outcome.metrics) == (("a", "b", "c"), 4.0, {"loss": 2.5})


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (a_sum(1.0, "b", "c"), "counted twice"),
        (a_sum(1.0, "c", "d"), "not in the cohort"),
        (a_sum(1.0, "c", "c"), "counted twice"),
        (a_sum(math.nan, "c"), "NaN"),
        (a_sum(1.0, "c", weight=0.0), "weight"),
        (a_sum(1.0, "c", loss=math.inf), "metric"),
        (a_sum(1.0), "names no contributors"),
    ],
)
def test_a_partial_sum_that_is_refused_changes_nothing(
    second: Partial, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(aggregation.RULES, "mean", Trusting)  # so that it is the guard who refuses
    fleet = part_of_a_fleet(ScriptedFleet(dict.fromkeys("abc", silent)), a_sum(15.0, "a", "b"), second)
    outcome = one_round(fleet, config())
    assert outcome.parameters["w"].tolist() == [5.0, 5.0]
    assert outcome.admitted == ("a", "b")
    assert outcome.rejected.keys() == set(second.contributors) - {"a", "b"}
    assert all(reason in said for said in outcome.rejected.values())


@pytest.mark.parametrize(
    ("old", "delta", "message"),
    [
        (np.full(2, 3e38, np.float32), np.full(2, 3e38, np.float32), "'w' holds NaN or infinity"),
        (np.full(2, 6e4, np.float16), np.full(2, 6e4, np.float16), "'w' holds NaN or infinity"),
        (np.array([2**63 - 1]), np.array([1]), "'w' is beyond the range of int64"),
        (np.array([0]), np.array([2**63 - 1]), "'w' exceeds 64 bits"),
        (np.array([-(2**63)]), np.array([-1]), "'w' is beyond the range of int64"),
    ],
)
def test_a_step_beyond_a_dtype_fails_the_round_by_name_and_keeps_nothing(old: Any, delta: Any, message: str) -> None:
    kept = []

    def keep(tree: Any) -> Any:
        kept.append(tree)
        return tree

    fleet = ScriptedFleet({name: moves(name, delta) for name in ("a", "b")})
    with pytest.raises(StepFailed, match=message):
        list(run_rounds(job(config(), keep=keep), fleet, {"w": old}))
    assert kept == []


def test_a_server_optimizer_that_overflows_inside_fails_the_round() -> None:
    adam = ServerOptimizer(ServerConfig(optimizer="Adam"), gradient=False)
    large = np.full(2, 3e38, np.float32)  # its square is infinity, by which Adam divides: a step of 0
    with pytest.raises(StepFailed, match=r"exp_avg_sq' holds NaN or infinity"):
        list(run_rounds(Job(id="job", config=config(), step=adam), ScriptedFleet({"a": moves("a", large)}), START))
