"""The doubles that we ship do what their users' tests rely on."""

from __future__ import annotations

import numpy as np

from edgefl.config import TrainConfig
from edgefl.records import Failure, Plan, Traffic
from edgefl.testing import ManualClock, ScriptedFleet, make_update

PLAN = Plan(
    job="job", round=1, parameters={"w": np.zeros(2, np.float32)}, clients=("a", "b", "c"),
    train=TrainConfig(), deadline_s=1.0,
)  # fmt: skip


def fleet() -> ScriptedFleet:
    return ScriptedFleet({
        "a": lambda _plan: make_update("a", w=[1.0, 2.0]),
        "b": lambda plan: Failure(job=plan.job, round=plan.round, device="b", reason="no data"),
        "c": lambda _plan: None,
    })  # fmt: skip


def test_lists_become_float32_and_arrays_stay() -> None:
    update = make_update("a", weight=2.0, metrics={"loss": 1.0}, w=[1, 2], n=np.array(3, np.int64))
    assert (update.tree["w"].dtype, update.tree["n"].dtype) == (np.dtype(np.float32), np.dtype(np.int64))
    assert (update.device, update.weight, update.metrics, update.round) == ("a", 2.0, {"loss": 1.0}, 1)


def test_the_clock_moves_only_when_told() -> None:
    clock = ManualClock()
    assert (clock(), clock()) == (0.0, 0.0)
    clock.advance(1.5)
    assert clock() == 1.5


def test_the_fleet_answers_as_written_and_counts_bytes() -> None:
    scripted = fleet()
    assert [type(answer).__name__ for answer in scripted.collect(PLAN)] == ["Update", "Failure"]
    assert scripted.clients() == ("a", "b", "c")
    assert scripted.traffic() == Traffic(up_bytes=8, down_bytes=24)
    assert (scripted.plans, scripted.closed_early) == ([PLAN], 0)


def test_the_fleet_knows_when_it_was_closed_early() -> None:
    scripted = fleet()
    answers = scripted.collect(PLAN)
    next(answers)
    answers.close()
    assert scripted.closed_early == 1
