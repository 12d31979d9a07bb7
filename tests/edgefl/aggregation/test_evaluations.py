"""Federated evaluation: the metrics over all devices by hand, in any order and grouping, and hostile evaluations."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping

import pytest

from edgefl.aggregation.evaluations import MAX_NAMES, FederatedEvaluation, direction_in
from edgefl.guards import MAX_WEIGHT
from edgefl.records import DeviceEvaluation, EvaluationSpec

SPEC = EvaluationSpec(directions={"loss": False, "accuracy": True, "calls": None})
OPEN = EvaluationSpec(directions={"gain": False}, declared=False)


def of(weight: float = 1.0, **metrics: float) -> DeviceEvaluation:
    return DeviceEvaluation(metrics=metrics, weight=weight)


def named(metrics: Mapping[str, float], weight: float = 1.0) -> DeviceEvaluation:
    return DeviceEvaluation(metrics=metrics, weight=weight)


def fault_of(evaluation: DeviceEvaluation, spec: EvaluationSpec = SPEC) -> str:
    found = FederatedEvaluation(spec)
    found.add("cam", evaluation)
    assert found.metrics() == {}
    return found.faults["cam"]


def test_mean_spread_and_worst_of_three_devices_by_hand() -> None:
    found = FederatedEvaluation(SPEC)
    found.add("a", of(accuracy=1.0, weight=1))
    found.add("b", of(accuracy=0.5, weight=1))
    found.add("c", of(accuracy=0.0, weight=2))
    metrics = found.metrics()
    assert metrics["devices/accuracy"] == 0.375  # (1 * 1 + 1 * 0.5 + 2 * 0) / 4
    # weighted squares: (0.625^2 + 0.125^2 + 2 * 0.375^2) / 4
    assert metrics["devices/accuracy/std"] == math.sqrt((0.390625 + 0.015625 + 2 * 0.140625) / 4)
    assert metrics["devices/accuracy/worst_tenth"] == 0.0
    assert metrics["devices/count"] == 3.0
    assert set(metrics) == {
        "devices/count", "devices/accuracy", "devices/accuracy/std", "devices/accuracy/worst_tenth",
    }  # fmt: skip


def test_the_worst_tenth_goes_by_the_direction_and_counts_each_device_alike() -> None:
    found = FederatedEvaluation(SPEC)
    for number in range(29):  # a tenth of 29 is 2 whole devices
        found.add(str(number), of(loss=float(number), accuracy=float(number), calls=1.0, weight=1 + number))
    metrics = found.metrics()
    assert metrics["devices/loss/worst_tenth"] == 27.5  # the two largest
    assert metrics["devices/accuracy/worst_tenth"] == 0.5  # the two smallest
    assert "devices/calls/worst_tenth" not in metrics  # no direction
    assert metrics["devices/calls/std"] == 0.0


def test_one_device_is_its_own_worst_tenth() -> None:
    found = FederatedEvaluation(SPEC)
    found.add("a", of(accuracy=0.25, weight=4))
    assert found.metrics() == {
        "devices/count": 1.0, "devices/accuracy": 0.25, "devices/accuracy/std": 0.0,
        "devices/accuracy/worst_tenth": 0.25,
    }  # fmt: skip


def test_order_and_grouping_do_not_change_a_bit() -> None:
    devices = [(str(n), of(accuracy=1 / (n + 3), loss=math.pi * n, weight=n % 7 + 1)) for n in range(40)]
    flat = FederatedEvaluation(SPEC)
    for device, evaluation in reversed(devices):
        flat.add(device, evaluation)
    top = FederatedEvaluation(SPEC)
    for part in (devices[:13], devices[13:14], devices[14:]):
        region = FederatedEvaluation(SPEC)
        for device, evaluation in part:
            region.add(device, evaluation)
        top.merge(pickle.loads(pickle.dumps(region.partial())))  # noqa: S301 - as between processes
    assert top.metrics() == flat.metrics()


def test_numbers_of_one_metric_have_its_direction() -> None:
    spec = EvaluationSpec(directions={"scores": True, "f1": None})
    assert direction_in(spec, "scores/3") is True
    assert direction_in(spec, "f1/macro") is True  # by its name
    found = FederatedEvaluation(spec)
    found.add("a", named({"scores/0": 1.0, "scores/1": 0.0}))
    assert found.metrics()["devices/scores/1/worst_tenth"] == 0.0


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        (DeviceEvaluation(fault="eval_data raised"), "eval_data raised"),
        (of(accuracy=math.nan), "metric 'accuracy' is nan, not a finite number"),
        (of(accuracy=-math.inf), "metric 'accuracy' is -inf"),
        (of(loss=1e101), "at most 1e+100"),
        (of(accuracy=1.0, weight=math.inf), "weight inf must be finite"),
        (of(accuracy=1.0, weight=-1.0), "weight -1.0 must be"),
        (of(accuracy=1.0, weight=2 * MAX_WEIGHT), "weight"),
        (of(weight=1.0), "it has 0 metrics"),
        (named({f"accuracy/{n}": 1.0 for n in range(201)}), "it has 201 metrics"),
        (of(accuracy=1.0, evil=1.0), "metric 'evil' is not one of the task's: loss, accuracy, calls"),
        (named({"accuracy/" + 300 * "a": 1.0}), "at most 200 characters"),
        (named({"accuracy/\x1b[2J": 1.0}), "without control characters"),
        (named({"accuracy": 1.0, "accuracy/std": 2.0}), "would both be devices/accuracy/std"),
    ],
)
def test_an_evaluation_that_cannot_count_says_why(evaluation: DeviceEvaluation, words: str) -> None:
    assert words in fault_of(evaluation)


def test_a_refused_evaluation_leaves_no_trace() -> None:
    found = FederatedEvaluation(SPEC)
    found.add("a", of(accuracy=0.5))
    before = found.metrics()
    found.add("evil", of(accuracy=1.0, loss=math.nan))
    assert found.metrics() == before
    assert list(found.faults) == ["evil"]


def test_the_largest_values_and_weights_stay_finite() -> None:
    found = FederatedEvaluation(SPEC)
    for device, value in (("a", 1e100), ("b", -1e100)):
        found.add(device, of(loss=value, weight=MAX_WEIGHT))
    assert all(math.isfinite(value) for value in found.metrics().values())
    assert found.metrics()["devices/loss/std"] == 1e100


def test_a_name_of_a_minority_is_left_out_where_a_tasks_function_names_the_metrics() -> None:
    found = FederatedEvaluation(OPEN)
    for device in "abc":
        found.add(device, of(gain=1.0))
    found.add("evil", of(gain=2.0, evil=9.0))
    assert "devices/evil" not in found.metrics()
    assert found.metrics()["devices/gain/worst_tenth"] == 2.0  # lower is better


def test_names_of_two_devices_that_would_become_one_are_refused() -> None:
    found = FederatedEvaluation(OPEN)
    found.add("a", named({"gain": 1.0}))
    found.add("b", named({"gain/std": 7.0}))
    assert "would both be devices/gain/std" in found.faults["b"]
    found.add("c", named({"count": 7.0}))
    assert "devices/count is the number of devices" in found.faults["c"]


def test_hostile_devices_cannot_grow_the_number_of_names() -> None:
    found = FederatedEvaluation(OPEN)
    for device in range(20):
        found.add(str(device), named({f"m{device}x{n}": 1.0 for n in range(100)}))
    assert len(found.partial().values) == MAX_NAMES
    assert f"{MAX_NAMES} different metrics at most" in found.faults["19"]
