"""Virtual time: the order and the hours of a round, whatever the speed of this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from edgefl.aggregation.mean import WeightedMean
from edgefl.aggregation.server_opt import ServerOptimizer
from edgefl.config import JobConfig, from_dict
from edgefl.errors import QuorumNotMet
from edgefl.records import Answer, Failure, Partial, Plan, RoundOutcome, Traffic, Update
from edgefl.rounds import Job, run_rounds
from edgefl.settings.server import ServerConfig
from edgefl.simulation.world.clock import VirtualClock, VirtualFleet
from edgefl.simulation.world.devices import Devices, DevicesConfig
from edgefl.simulation.world.names import Names
from edgefl.testing import make_update
from edgefl.trees import encoded_bytes

START = {"w": np.zeros(2, np.float32)}
INSTANT = {
    "speed": {"mean": 1e12},
    "uplink_mbps": {"mean": 1e12},
    "downlink_mbps": {"mean": 1e12},
    "rtt_s": {"mean": 0.0},
}


class Inner:
    """An engine: answers a plan's clients in the order that `shuffle` gives, as `answer` says."""

    def __init__(
        self, names: Sequence[str], *, answer: Callable[[Plan, str], Answer | None] | None = None,
        shuffle: Callable[[list[str]], list[str]] = list,
    ) -> None:  # fmt: skip
        self.names, self.answer, self.shuffle = names, answer or sends, shuffle
        self.asked: list[tuple[str, ...]] = []

    def clients(self) -> Sequence[str]:
        raise AssertionError("who is there is the devices' to say")

    def collect(self, plan: Plan) -> Iterator[Answer]:
        self.asked.append(plan.clients)
        for client in self.shuffle(list(plan.clients)):
            if (answer := self.answer(plan, client)) is not None:
                yield answer

    def traffic(self) -> Traffic:
        return Traffic()


def sends(plan: Plan, client: str) -> Update:
    number = float(client.rpartition("-")[2])
    return make_update(client, job=plan.job, round=plan.round, weight=number + 1, w=[number, 1.0])


def fails(*failing: str) -> Callable[[Plan, str], Answer]:
    def answer(plan: Plan, client: str) -> Answer:
        if client in failing:
            return Failure(job=plan.job, round=plan.round, device=client, reason="no data")
        return sends(plan, client)

    return answer


class Simulated:
    """A run on virtual devices; client i has i + 1 samples, and answers i + 1 seconds after the start."""

    def __init__(
        self, count: int = 4, *, inner: Inner | None = None, rounds: dict[str, Any] | None = None, **devices: Any
    ):
        self.names, self.clock = Names(count), VirtualClock()
        self.config = from_dict(JobConfig, {"rounds": rounds or {}})
        self.inner = inner or Inner(self.names)
        self.devices = Devices(from_dict(DevicesConfig, {**INSTANT, "speed": {"mean": 1.0}, **devices}), self.names)
        self.fleet = VirtualFleet(
            self.inner, self.devices, self.clock,
            rounds=self.config.rounds, num_samples=lambda client: self.names.index(client) + 1,
        )  # fmt: skip

    def run(self) -> Iterator[RoundOutcome]:
        step = ServerOptimizer(ServerConfig(), gradient=False)
        return run_rounds(Job(id="job", config=self.config, step=step, clock=self.clock), self.fleet, START)


def test_answers_come_in_virtual_order_each_at_its_time() -> None:
    run = Simulated(inner=Inner(Names(4), shuffle=lambda clients: clients[::-1]))
    plan_of = next(run.run())
    assert plan_of.admitted == ("client-0", "client-1", "client-2", "client-3")
    assert plan_of.seconds == run.clock() == pytest.approx(4.0)


def test_bytes_are_those_of_the_deployed_fleet() -> None:
    outcome = next(Simulated(rounds={"clients": 2, "over_selection": 0.5}).run())
    assert (outcome.down_bytes, outcome.up_bytes) == (3 * encoded_bytes(START), 2 * encoded_bytes(START))


def test_over_selection_takes_the_first_and_trains_nobody_else() -> None:
    run = Simulated(rounds={"clients": 2, "over_selection": 1.0, "count": 2})
    first, second = run.run()
    assert (first.admitted, first.missing) == (("client-0", "client-1"), ("client-2", "client-3"))
    assert run.inner.asked == [("client-0", "client-1")] * 2
    assert (first.seconds, second.seconds, run.clock()) == pytest.approx((2.0, 2.0, 4.0))


def test_one_that_fails_is_replaced_by_the_next_to_arrive() -> None:
    inner = Inner(Names(4), answer=fails("client-0"))
    outcome = next(Simulated(inner=inner, rounds={"clients": 2, "over_selection": 1.0}).run())
    assert inner.asked == [("client-0", "client-1"), ("client-2",)]
    assert (outcome.admitted, outcome.failed) == (("client-1", "client-2"), {"client-0": "no data"})
    assert outcome.seconds == pytest.approx(3.0)


def test_one_that_the_guard_refuses_is_replaced_too() -> None:
    def poisoned(plan: Plan, client: str) -> Update:
        if client != "client-0":
            return sends(plan, client)
        return make_update(client, job=plan.job, round=plan.round, w=[math.nan, 0.0])

    outcome = next(
        Simulated(inner=Inner(Names(4), answer=poisoned), rounds={"clients": 2, "over_selection": 1.0}).run()
    )
    assert (outcome.admitted, tuple(outcome.rejected)) == (("client-1", "client-2"), ("client-0",))


def test_the_late_are_missing_and_cost_the_whole_deadline() -> None:
    run = Simulated(rounds={"deadline_s": 2.5})
    outcome = next(run.run())
    assert (outcome.admitted, outcome.missing) == (("client-0", "client-1"), ("client-2", "client-3"))
    assert outcome.seconds == 2.5
    assert run.inner.asked == [("client-0", "client-1")]


def test_the_lost_cost_the_grace_once_the_quorum_is_there_and_else_the_deadline() -> None:
    lossy = {"availability": {"dropout": 0.5}}
    outcome = next(Simulated(20, rounds={"deadline_s": 100.0, "offline_grace_s": 5.0}, **lossy).run())
    assert 0 < len(outcome.missing) < 20
    assert outcome.seconds <= 25.0
    every = Simulated(20, rounds={"deadline_s": 100.0, "quorum": 20}, **lossy)
    with pytest.raises(QuorumNotMet, match="no answer within 100 s"):
        next(every.run())
    assert every.clock() == 100.0


def test_a_partial_sum_is_there_when_its_last_client_is() -> None:
    class Sums(Inner):
        def collect(self, plan: Plan) -> Iterator[Answer]:
            for clients in (plan.clients[1::2], plan.clients[::2]):
                rule = WeightedMean(plan.parameters)
                for client in clients:
                    rule.add(sends(plan, client))
                yield rule.partial()

    run = Simulated(inner=Sums(Names(4)))
    plan = Plan(
        job="job", round=1, parameters=START, clients=tuple(run.names), train=run.config.train, deadline_s=600.0
    )
    seen = [(answer.contributors, run.clock()) for answer in run.fleet.collect(plan) if isinstance(answer, Partial)]
    assert seen == [(("client-0", "client-2"), pytest.approx(3.0)), (("client-1", "client-3"), pytest.approx(4.0))]
    assert run.fleet.traffic().up_bytes == 4 * encoded_bytes(START)


def test_an_engine_that_loses_a_client_delays_nobody_else() -> None:
    silent = Inner(Names(4), answer=lambda plan, client: None if client == "client-1" else sends(plan, client))
    outcome = next(Simulated(inner=silent, rounds={"deadline_s": 50.0}).run())
    assert (outcome.admitted, outcome.missing) == (("client-0", "client-2", "client-3"), ("client-1",))
    assert outcome.seconds == 50.0


def test_an_engine_that_was_stopped_is_not_asked_again() -> None:
    stopped = Inner(Names(4), answer=lambda _plan, _client: None)
    with pytest.raises(QuorumNotMet):
        next(Simulated(inner=stopped, rounds={"clients": 1, "over_selection": 3.0}).run())
    assert len(stopped.asked) == 1


def test_answers_twice_and_from_elsewhere_are_left_to_the_guard() -> None:
    class Babbling(Inner):
        def collect(self, plan: Plan) -> Iterator[Answer]:
            for client in ("client-9", "client-0", *plan.clients):
                yield sends(plan, client)

    outcome = next(Simulated(inner=Babbling(Names(4))).run())
    assert len(outcome.admitted) == 4
    assert set(outcome.rejected) == {"client-9", "client-0"}


def test_a_device_without_the_memory_fails_with_its_reason() -> None:
    run = Simulated(memory_mb={"kind": "uniform", "min": 0.0, "max": 0.0})
    small = {"w": np.zeros(1000, np.float32)}
    plan = Plan(job="job", round=1, parameters=small, clients=tuple(run.names), train=run.config.train, deadline_s=9.0)
    answers = list(run.fleet.collect(plan))
    assert [answer.reason for answer in answers if isinstance(answer, Failure)] == [
        "training needs 0.0 MB, 4 times the model; the device has 0.0 MB"
    ] * 4
    assert run.inner.asked == []
    assert run.fleet.traffic() == Traffic()


def test_only_those_that_are_there_are_asked_and_the_night_is_waited_for() -> None:
    night = {"kind": "diurnal", "scatter": 0.0, "share": 0.25, "centre_s": 50_000.0}
    run = Simulated(rounds={"wait_s": 40_000.0, "count": 2}, availability=night)
    first, second = run.run()
    assert len(first.admitted) == len(second.admitted) == 4
    assert 50_000 - 10_800 <= run.clock() < 50_000 - 10_800 + 1000  # the window opens; the next round is in it
    with pytest.raises(QuorumNotMet, match="0 clients are available"):
        next(Simulated(rounds={"wait_s": 60.0}, availability=night).run())


def test_time_never_runs_back() -> None:
    clock = VirtualClock(5.0)
    clock.move_to(3.0)
    assert clock() == 5.0


def test_results_do_not_depend_on_real_speed() -> None:
    def outcomes(inner: Inner) -> list[Any]:
        settings = {"clients": 6, "over_selection": 0.5, "deadline_s": 20.0, "count": 4}
        run = Simulated(
            16, inner=inner, rounds=settings, speed={"mean": 8.0}, availability={"dropout": 0.2},
            delay_s={"kind": "lognormal", "mean": 2.0, "std": 2.0},
        )  # fmt: skip
        return [
            (one.admitted, one.missing, one.seconds, one.parameters["w"].tolist(), one.up_bytes) for one in run.run()
        ]

    fast = outcomes(Inner(Names(16)))
    rng = np.random.default_rng(5)
    slow = Inner(Names(16), shuffle=lambda clients: [str(one) for one in rng.permutation(clients)])
    assert outcomes(slow) == fast
    assert len({one[2] for one in fast}) == 4


def expected_maximum(count: int, mean: float, std: float) -> float:
    """E[max of `count` normals] = integral of x * n * phi(x) * Phi(x)^(n-1), on a fine grid."""
    z = np.linspace(-9, 9, 20_001)
    phi = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    below = np.array([math.erf(value / math.sqrt(2)) for value in z]) / 2 + 0.5
    return mean + std * float(np.sum(z * count * phi * below ** (count - 1)) * (z[1] - z[0]))


def test_the_mean_round_is_the_mean_of_the_maximum_of_sixteen_normals() -> None:
    mean, std, rounds = 10.0, 2.0, 1200
    assert expected_maximum(16, 0, 1) == pytest.approx(1.76599, abs=1e-5)  # tables of order statistics
    run = Simulated(
        16, rounds={"count": rounds}, speed={"mean": 1e12}, delay_s={"kind": "normal", "mean": mean, "std": std}
    )
    seconds = np.array([one.seconds for one in run.run()])
    error = seconds.std(ddof=1) / math.sqrt(rounds)
    assert error < 0.06
    assert abs(seconds.mean() - expected_maximum(16, mean, std)) < 4 * error
    assert run.clock() == pytest.approx(seconds.sum())


def test_a_day_of_ten_thousand_phones_takes_no_day() -> None:
    run = Simulated(
        10_000, rounds={"clients": 20, "over_selection": 0.3, "count": 10_000, "wait_s": 43_200.0},
        speed={"kind": "lognormal", "mean": 20.0, "std": 10.0}, availability={"kind": "diurnal", "dropout": 0.05},
        rtt_s={"mean": 60.0},
    )  # fmt: skip
    outcomes = []
    for outcome in run.run():
        outcomes.append((len(outcome.admitted), run.clock()))
        if run.clock() > 86_400:
            break
    admitted, ends_s = np.array(outcomes).T
    assert admitted.max() == 20
    assert admitted.mean() > 17  # some leave in the midst of a round
    steps_s = np.diff(ends_s)
    assert steps_s.max() > 8 * 3600  # the day, when no phone charges
    assert np.median(steps_s) < 1000


def test_training_empties_the_battery_until_the_night() -> None:
    battery = {"kind": "battery", "scatter": 0.0, "share": 0.25, "min_level": 0.5, "drain_per_hour": 1000.0}
    run = Simulated(4, rounds={"count": 3, "wait_s": 86_400.0, "offline_grace_s": 0.0}, availability=battery)
    run.clock.move_to(8 * 3600.0)  # off the charger since 6:00; a second's training costs 0.28
    first, second, third = ((outcome.admitted, run.clock()) for outcome in run.run())
    assert first == (tuple(run.names), 8 * 3600 + 4.0)
    assert second[0] == ("client-0",)  # 0.62 is left to it, and less than 0.5 to the others
    assert third[0] == tuple(run.names)
    assert third[1] > 24 * 3600


def test_after_the_quorum_a_fixed_window_ends_the_round() -> None:
    run = Simulated(rounds={"quorum": 2, "grace": 1.0})
    outcome = next(run.run())
    assert (outcome.admitted, outcome.missing) == (("client-0", "client-1", "client-2"), ("client-3",))
    assert outcome.seconds == pytest.approx(3.0)  # two after 2 s, and one second more


def test_the_window_adapts_to_what_earlier_rounds_took() -> None:
    """Answers after 4, 5, 6 and 80 s: the first round waits for all, the next ones while it pays."""
    run = Simulated(rounds={"quorum": 2, "grace": "auto", "count": 4})
    run.fleet = VirtualFleet(
        run.inner, run.devices, run.clock, rounds=run.config.rounds,
        num_samples=lambda client: (4, 5, 6, 80)[run.names.index(client)],
    )  # fmt: skip
    first, *others = run.run()
    assert (len(first.admitted), first.seconds) == (4, pytest.approx(80.0))
    assert [one.missing for one in others] == [("client-3",)] * 3
    assert all(6.0 <= one.seconds <= 12.0 for one in others)  # client-3 would cost 80


def test_a_lost_client_is_known_to_be_offline_later() -> None:
    run = Simulated(rounds={"offline_grace_s": 1.0}, availability={"dropout": 1.0})
    run.fleet = VirtualFleet(
        run.inner, run.devices, run.clock, rounds=run.config.rounds, num_samples=lambda _client: 1, noticed_s=7.0
    )
    with pytest.raises(QuorumNotMet):
        next(run.run())
    assert run.clock() == 600.0  # without a quorum, offline devices are waited for


def test_a_refused_update_is_none_of_the_quorum() -> None:
    def sends_nan(plan: Plan, client: str) -> Update:
        return make_update(client, job=plan.job, round=plan.round, w=[math.nan if client == "client-0" else 1.0, 1.0])

    run = Simulated(rounds={"quorum": 2, "grace": 0.0}, inner=Inner(Names(4), answer=sends_nan))
    step = ServerOptimizer(ServerConfig(), gradient=False)
    job = Job(id="job", config=run.config, step=step, clock=run.clock, on_refusal=run.fleet.refuse)
    outcome = next(run_rounds(job, run.fleet, START))
    assert (outcome.admitted, list(outcome.rejected)) == (("client-1", "client-2"), ["client-0"])
    assert outcome.seconds == pytest.approx(3.0)


def test_a_late_client_counts_one_round_later_and_begins_that_round_when_it_is_free() -> None:
    rounds = {"quorum": 2, "grace": 0.5, "late": "next", "count": 3}
    run = Simulated(rounds=rounds)
    first, second, third = run.run()  # rounds end half a second after client-1: at 2.5, 5 and 7.5
    assert (first.admitted, first.missing, first.late) == (("client-0", "client-1"), ("client-2", "client-3"), ())
    assert (second.admitted, second.late) == (("client-0", "client-1"), ("client-2", "client-3"))
    before, after = first.parameters["w"][0], second.parameters["w"][0]
    assert after - before == pytest.approx((3 * 2 + 4 * 3 + 1 * 0 + 2 * 1) / (3 + 4 + 1 + 2))
    assert third.late == ("client-2",)  # it began at 3 and needs 3 s; client-3 began at 4, so it is done at 8
    assert (first.seconds, second.seconds, third.seconds) == pytest.approx((2.5, 2.5, 2.5))
    assert second.up_bytes == 4 * encoded_bytes(START)
    refuses = Simulated(rounds=rounds | {"late": "refuse"})
    assert [outcome.late for outcome in refuses.run()] == [(), (), ()]


def test_a_late_client_that_fails_sends_nothing() -> None:
    rounds = {"quorum": 2, "grace": 0.5, "late": "next", "count": 2}
    run = Simulated(3, inner=Inner(Names(3), answer=fails("client-2")), rounds=rounds)
    _, second = run.run()
    assert (second.admitted, second.late, second.failed) == (("client-0", "client-1"), (), {})
