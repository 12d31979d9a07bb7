"""Federated evaluation in rounds, on its schedule, and after the last round; and partial sums with evaluations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from edgefl.aggregation.server_opt import ServerOptimizer
from edgefl.config import JobConfig, from_dict
from edgefl.errors import UpdateRejected
from edgefl.guards import RoundGuard
from edgefl.records import (
    DeviceEvaluation,
    Evaluated,
    Evaluations,
    EvaluationSpec,
    Failure,
    Partial,
    Plan,
    RoundOutcome,
    Update,
)
from edgefl.rounds import Job, LastEvaluation, evaluate_last, run_rounds
from edgefl.settings.server import ServerConfig
from edgefl.testing import ScriptedClient, ScriptedFleet, make_update

START = {"w": np.zeros(2, np.float32)}
SPEC = EvaluationSpec(directions={"accuracy": True})


def config(**sections: Mapping[str, Any]) -> JobConfig:
    return from_dict(JobConfig, sections)


def job(settings: JobConfig, **changes: Any) -> Job:
    return Job(id="job", config=settings, step=ServerOptimizer(ServerConfig(), gradient=False), **changes)


def one_round(fleet: ScriptedFleet, settings: JobConfig, **changes: Any) -> RoundOutcome:
    return next(run_rounds(job(settings, **changes), fleet, START))


def sends(device: str, w: float = 1.0, **metrics: float) -> ScriptedClient:
    return lambda plan: make_update(device, job=plan.job, round=plan.round, metrics=metrics, w=[w, w])


def fails(device: str) -> ScriptedClient:
    return lambda plan: Failure(job=plan.job, round=plan.round, device=device, reason="no data")


def silent(_plan: Plan) -> None:
    return None


def evaluates(device: str, value: float, weight: float = 1.0, **changes: Any) -> ScriptedClient:
    """Answer a plan with what it asks: an update with an evaluation, or an evaluation alone."""
    evaluation = DeviceEvaluation(metrics={"accuracy": value}, weight=weight, **changes)

    def answer(plan: Plan) -> Update | Evaluated:
        if not plan.fit:
            return Evaluated(job=plan.job, round=plan.round, device=device, evaluation=evaluation)
        update = make_update(device, job=plan.job, round=plan.round, w=[1.0, 1.0])
        return dataclasses.replace(update, evaluation=evaluation if plan.evaluate else None)

    return answer


def test_the_cohorts_evaluations_are_metrics_of_the_round() -> None:
    fleet = ScriptedFleet({"a": evaluates("a", 1.0, 3), "b": evaluates("b", 0.0, 1), "c": sends("c")})
    outcome = one_round(fleet, config(rounds={"quorum": 3}), evaluation=SPEC)
    assert outcome.metrics["devices/accuracy"] == 0.75
    assert outcome.metrics["devices/count"] == 2.0
    assert "it sent no evaluation" in outcome.not_evaluated["c"]
    assert outcome.admitted == ("a", "b", "c")


def test_a_refused_update_has_no_evaluation_that_counts_and_a_second_one_neither() -> None:
    fleet = ScriptedFleet({"a": evaluates("a", 1.0), "b": evaluates("a", 0.0), "c": sends("c", math.nan)})
    outcome = one_round(fleet, config(), evaluation=SPEC)
    assert outcome.metrics["devices/accuracy"] == 1.0
    assert outcome.metrics["devices/count"] == 1.0
    assert outcome.rejected.keys() == {"a", "c"}


def test_devices_are_asked_to_evaluate_on_schedule_and_only_if_the_task_can() -> None:
    fleet = ScriptedFleet({"a": evaluates("a", 1.0)})
    list(run_rounds(job(config(rounds={"count": 5, "evaluate_every": 2}), evaluation=SPEC), fleet, START))
    assert [plan.round for plan in fleet.plans if plan.evaluate] == [2, 4, 5]
    fleet = ScriptedFleet({"a": evaluates("a", 1.0)})
    list(run_rounds(job(config(rounds={"count": 2})), fleet, START))
    assert not any(plan.evaluate for plan in fleet.plans)


def test_a_training_metric_cannot_pass_for_an_evaluation() -> None:
    fleet = ScriptedFleet({"a": sends("a"), "evil": sends("evil", **{"devices/accuracy": 1.0})})
    outcome = one_round(fleet, config(), evaluation=SPEC)
    assert "begins with devices/" in outcome.rejected["evil"]
    assert "devices/accuracy" not in outcome.metrics


def test_the_last_parameters_are_evaluated_without_training() -> None:
    fleet = ScriptedFleet({"a": evaluates("a", 1.0, 3), "b": evaluates("b", 0.0, 1), "c": fails("c"), "d": silent,
                           "e": sends("e")})  # fmt: skip
    last = evaluate_last(job(config(rounds={"count": 2, "deadline_s": 9.0}), evaluation=SPEC), fleet, START)
    assert last.metrics["devices/accuracy"] == 0.75
    assert last.not_evaluated == {
        "c": "no data", "d": "no answer within 9 s", "e": "it sent an update, but was asked to evaluate",
    }  # fmt: skip
    (plan,) = fleet.plans
    assert (plan.round, plan.evaluate, plan.fit) == (3, True, False)
    assert plan.parameters is START


def test_the_last_evaluation_stops_when_enough_devices_have_answered() -> None:
    fleet = ScriptedFleet({name: evaluates(name, 1.0) for name in "abcd"})
    settings = config(rounds={"clients": 2, "over_selection": 1.0})
    last = evaluate_last(job(settings, evaluation=SPEC), fleet, START)
    assert (last.metrics["devices/count"], last.not_evaluated) == (2.0, {})
    assert fleet.closed_early == 1


def test_too_few_devices_for_the_last_evaluation_are_told_and_no_error() -> None:
    fleet = ScriptedFleet({"a": evaluates("a", 1.0)})
    last = evaluate_last(job(config(rounds={"quorum": 2}), evaluation=SPEC), fleet, START)
    assert (last.metrics, fleet.plans) == ({}, [])
    assert "the quorum is 2" in last.reason


@pytest.mark.parametrize("changes", [{"evaluation": None}, {"evaluation": SPEC, "never": 0}])
def test_no_last_evaluation_where_none_is_wanted(changes: dict[str, Any]) -> None:
    fleet = ScriptedFleet({"a": evaluates("a", 1.0)})
    settings = config(rounds={"evaluate_every": changes.pop("never", 1)})
    assert evaluate_last(job(settings, **changes), fleet, START) == LastEvaluation()
    assert fleet.plans == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"count": 3}, "3 devices and 0 faults of 2"),
        ({"faults": {"z": "x"}, "count": 1}, "z is not a contributor"),
        ({"values": {"accuracy": ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0])}}, "3 values and 3 weights"),
        ({"values": {"accuracy": ([1.0], [1.0, 1.0])}}, "1 values and 2 weights"),
        ({"values": {"accuracy": ([math.nan], [1.0])}}, "is nan, not a finite number"),
        ({"values": {"accuracy": ([1.0], [math.inf])}}, "weight inf"),
    ],
)
def test_a_partial_sum_with_wrong_evaluations_is_refused(changes: dict[str, Any], words: str) -> None:
    known: dict[str, Any] = {"values": {"accuracy": ([1.0, 0.0], [1.0, 1.0])}, "count": 2, "faults": {}}
    partial = Partial(total={"w": np.zeros(2)}, weight=2.0, contributors=("a", "b"))
    guard = RoundGuard(Plan(job="job", round=1, parameters=START, clients=("a", "b"), train=config().train,
                            deadline_s=1.0))  # fmt: skip
    with pytest.raises(UpdateRejected, match=words):
        guard.admit_partial(dataclasses.replace(partial, evaluations=Evaluations(**known | changes)))
    guard.admit_partial(dataclasses.replace(partial, evaluations=Evaluations(**known)))
