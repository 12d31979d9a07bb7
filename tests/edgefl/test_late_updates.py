"""`rounds.late = "next"`: by hand, by the guard, and who is refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from edgefl.aggregation import RULES, WeightedMean, check_rule
from edgefl.aggregation.server_opt import ServerOptimizer
from edgefl.config import JobConfig, from_dict
from edgefl.errors import ConfigError, UpdateRejected
from edgefl.guards import RoundGuard
from edgefl.records import Failure, Plan, RoundOutcome, Traffic, Update
from edgefl.rounds import Job, run_rounds
from edgefl.settings.server import ServerConfig
from edgefl.testing import make_update

START = {"w": np.zeros(1, np.float32)}


class Fleet:
    """Answers as a table says: for each round, the devices, the rounds that they answer, values and weights."""

    def __init__(self, *rounds: Sequence[tuple[str, int, float, float]]) -> None:
        self.rounds, self.plans = rounds, list[Plan]()

    def clients(self) -> Sequence[str]:
        return ("a", "b")

    def collect(self, plan: Plan) -> Iterator[Update]:
        self.plans.append(plan)
        for device, number, value, weight in self.rounds[plan.round - 1]:
            yield make_update(device, job=plan.job, round=number, weight=weight, w=[value], metrics={"loss": value})

    def traffic(self) -> Traffic:
        return Traffic()


def run(fleet: Fleet, late: str = "next", **changes: object) -> list[RoundOutcome]:
    config = from_dict(JobConfig, {"rounds": {"count": len(fleet.rounds), "late": late}})
    step = ServerOptimizer(ServerConfig(), gradient=False)
    return list(run_rounds(Job(id="job", config=config, step=step, **changes), fleet, START))


def test_a_late_update_is_folded_into_the_next_version_with_its_weight() -> None:
    fleet = Fleet([("a", 1, 1.0, 1)], [("b", 1, 4.0, 2), ("a", 2, 1.0, 1), ("b", 2, 7.0, 1)], [("a", 3, 1.0, 1)])
    first, second, third = run(fleet)
    assert (first.missing, first.late, fleet.plans[1].owed) == (("b",), (), ("b",))
    assert (second.admitted, second.late, second.weight) == (("a", "b"), ("b",), 4.0)
    assert second.parameters["w"].tolist() == [1.0 + (2 * 4 + 1 + 7) / 4]
    assert second.metrics["loss"] == (2 * 4 + 1 + 7) / 4
    assert second.report().as_json()["late"] == 1
    assert "late" not in first.report().as_json()
    assert second.report().counts_text() == "2 admitted, 1 late"
    assert third.late == ()
    assert fleet.plans[2].owed == ()


def test_once_only_and_only_into_the_directly_following_round() -> None:
    fleet = Fleet(
        [("a", 1, 1.0, 1)], [("b", 1, 4.0, 1), ("b", 1, 4.0, 1), ("a", 1, 9.0, 1), ("a", 2, 1.0, 1)],
        [("b", 1, 4.0, 1), ("a", 3, 1.0, 1)],
    )  # fmt: skip
    refused: list[str] = []
    _, second, third = run(fleet, on_refusal=lambda _plan, answer, why: refused.append(f"{answer.device}: {why}"))
    assert (second.admitted, second.late, second.rejected) == (("a",), ("b",), {})
    assert third.late == ()
    assert refused[:2] == ["b: its round 1 is over", "a: its round 1 is over"]
    assert "b: it is for round 1 of job 'job'; open is round 3" in refused[2]


def test_without_the_setting_it_is_refused_by_name() -> None:
    fleet = Fleet([("a", 1, 1.0, 1)], [("b", 1, 4.0, 1), ("a", 2, 1.0, 1)])
    second = run(fleet, late="refuse")[1]
    assert second.late == ()
    assert second.rejected == {"b": "it is for round 1 of job 'job'; open is round 2 of 'job'"}


def test_the_last_round_owes_nothing_and_a_restart_knows_who_is_owed() -> None:
    fleet = Fleet([("a", 1, 1.0, 1)], [("b", 1, 4.0, 1), ("a", 2, 1.0, 1)])
    [second] = run(fleet, first_round=2, owed=("b",))
    assert second.late == ("b",)


@pytest.mark.parametrize(
    ("update", "said"),
    [
        (make_update("b", round=1, w=[np.nan]), "NaN"),
        (make_update("b", round=1, weight=-1.0, w=[1.0]), "weight -1.0"),
        (make_update("b", round=1, w=[1.0, 2.0]), "float32"),
        (make_update("c", round=1, w=[1.0]), "its round 1 is over"),
    ],
)
def test_the_guard_checks_it_as_any_other(update: Update, said: str) -> None:
    train = JobConfig().train
    plan = Plan(job="job", round=2, parameters=START, clients=("a",), train=train, deadline_s=1, owed=("b",))
    guard = RoundGuard(plan)
    with pytest.raises(UpdateRejected, match=said):
        guard.admit(update)
    guard.admit(make_update("b", round=1, w=[1.0]))


def test_a_failure_of_the_cohort_is_not_a_late_one() -> None:
    class Failing(Fleet):
        def collect(self, plan: Plan) -> Iterator[Update | Failure]:
            yield from super().collect(plan)
            yield Failure(job=plan.job, round=plan.round, device="b", reason="no data")

    second = run(Failing([("a", 1, 1.0, 1)], [("a", 2, 1.0, 1)]))[1]
    assert second.failed == {"b": "no data"}


class Compares(WeightedMean):
    merges = False


def test_what_cannot_take_another_version_refuses_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgefl.aggregation.RULES", {**RULES, "median": Compares})
    late = {"rounds": {"late": "next"}}
    check_rule(from_dict(JobConfig, late))
    with pytest.raises(ConfigError, match="the rule 'median' compares updates of one version"):
        check_rule(from_dict(JobConfig, late | {"aggregation": {"rule": "median"}}))
    check_rule(dataclasses.replace(JobConfig(), rounds=JobConfig().rounds))
    for section, said in (
        ({"train": {"algorithm": "fedsgd"}}, "a gradient is of its own version alone"),
        ({"tiers": {"region_rounds": 2}}, "needs tiers.region_rounds=1"),
        ({"tiers": {"fan_out": [2]}}, "updates below a region cannot be late"),
        ({"rounds": {"late": "soon"}}, "rounds.late='soon' is not one of: refuse, next"),
    ):
        with pytest.raises(ConfigError, match=said):
            from_dict(JobConfig, late | section)
