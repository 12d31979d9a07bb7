"""Regions in a simulation: exact at any depth, regional rounds, and the traffic of each tier's links by hand."""

from __future__ import annotations

import numpy as np
import pytest

import edgefl
from edgefl.errors import ConfigError
from edgefl.settings.server import TiersConfig
from edgefl.simulation.study.report import SimulationResult
from edgefl.simulation.world.schedule import Schedule
from edgefl.simulation.world.tiers import TierTree
from edgefl.task import FitResult, Task

SIZE = 8  # bytes of the parameters: one float64


def fit(parameters, config, options):
    part = int(options["part"])
    if part == 5:
        raise ValueError("this one cannot")
    return FitResult(tree={"w": (part - parameters["w"]) / 2}, weight=part + 1, metrics={"loss": float(part)})


TASK = Task(name="numbers", initial=lambda: {"w": np.zeros(1)}, fit=fit)


def simulated(clients: int = 8, rounds: int = 2, **settings: object) -> SimulationResult:
    return edgefl.simulate(TASK, clients=clients, rounds=rounds, engine="loop", set=settings)


@pytest.mark.parametrize("fan_out", [[2], [3], [2, 2], [1, 1, 8], [8]])
def test_regions_change_nothing_but_the_bytes(fan_out: list[int]) -> None:
    flat, tiered = simulated(), simulated(**{"tiers.fan_out": fan_out})
    assert tiered.parameters["w"] == pytest.approx(flat.parameters["w"], rel=1e-12)
    assert [one.admitted for one in tiered.rounds] == [one.admitted for one in flat.rounds] == [7, 7]
    assert tiered.rounds[-1].metrics == pytest.approx(flat.rounds[-1].metrics)
    assert tiered.rounds[-1].reasons.keys() == flat.rounds[-1].reasons.keys() == {"client-5"}


def test_the_traffic_of_each_tier_is_counted() -> None:
    result = simulated(rounds=1, **{"tiers.fan_out": [2, 2]})
    devices, regions, above = result.as_json()["tiers"]
    flat = simulated(rounds=1).rounds[0]
    one = flat.down_bytes // 8
    assert (devices["regions"], devices["down_bytes"], devices["up_bytes"]) == (8, 8 * one, 7 * one)
    assert (regions["regions"], regions["down_bytes"], regions["up_bytes"]) == (4, 4 * one, 4 * one)
    assert (above["regions"], above["down_bytes"], above["up_bytes"]) == (2, 2 * one, 2 * one)
    assert (result.rounds[0].up_bytes, result.rounds[0].down_bytes) == (2 * one, 2 * one)


def test_regional_rounds_of_one_region_are_flat_rounds() -> None:
    regional = simulated(rounds=3, **{"tiers.fan_out": [8], "tiers.region_rounds": 2})
    assert regional.parameters["w"] == pytest.approx(simulated(rounds=6).parameters["w"], rel=1e-12)
    assert [one.admitted for one in regional.rounds] == [7, 7, 7]


def test_regional_rounds_are_weighted_by_hand() -> None:
    """Regions {0, 1} and {2, 3}, weights 1 to 4, two regional rounds of w <- w + mean((part - w) / 2)."""

    def region(first: int, second: int) -> tuple[float, float]:
        w, weights = 0.0, (first + 1, second + 1)
        for _ in range(2):
            w += (weights[0] * (first - w) / 2 + weights[1] * (second - w) / 2) / sum(weights)
        return w, sum(weights)

    (left, left_weight), (right, right_weight) = region(0, 1), region(2, 3)
    found = simulated(4, 1, **{"tiers.fan_out": [2], "tiers.region_rounds": 2})
    assert found.parameters["w"].item() == pytest.approx(
        (left * left_weight + right * right_weight) / (left_weight + right_weight)
    )


def test_the_regions_below_the_cloud_run_the_regional_rounds() -> None:
    deep, flat = ({"tiers.fan_out": fan_out, "tiers.region_rounds": 2} for fan_out in ([1, 4], [4]))
    one, other = simulated(**deep), simulated(**flat)
    assert one.parameters["w"] == pytest.approx(other.parameters["w"], rel=1e-12)
    devices, regions, above = one.as_json()["tiers"]
    assert devices["down_bytes"] == regions["down_bytes"] == 8 * above["down_bytes"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tiers.region_rounds": 2}, r"needs regions; a simulation has those of tiers\.fan_out"),
        ({"tiers.region_rounds": 2, "train.algorithm": "fedsgd"}, "needs train.algorithm=fedavg"),
        ({"tiers.region_rounds": 0}, r"tiers\.region_rounds"),
        ({"tiers.fan_out": [0]}, r"tiers\.fan_out"),
        ({"tiers.fan_out": [2] * 9}, "9 tiers, at most 8"),
        ({"tiers.fan_out": [2], "tiers.rtt_s": [1, 1]}, "2 values for 1 tiers"),
        ({"tiers.uplink_mbps": [0]}, r"tiers\.uplink_mbps"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        simulated(**settings)


def test_a_sum_leaves_its_region_with_the_last_of_its_clients() -> None:
    config = TiersConfig(fan_out=[2, 1], uplink_mbps=[8, 4], downlink_mbps=[8], rtt_s=[0.5])
    tree = TierTree(config, ["a", "b", "c", "d"])
    arrivals = {"c": 11.0, "a": 12.0, "b": 14.0, "d": 99.0}
    schedule = Schedule(end_s=100.0, arrivals=arrivals, late=(), lost={}, refused={})
    found = tree.delayed(schedule, start_s=10.0, model_bytes=1_000_000, sum_bytes=2_000_000)
    # Down: 1 s + 0.5 s in both tiers. Up: 2 s + 0.5 s in the first, 4 s + 0.5 s in the second.
    assert found.arrivals == pytest.approx({"c": 11 + 3 + 7, "a": 14 + 3 + 7, "b": 14 + 3 + 7})
    assert found.late == ("d",)  # its region does not wait for it beyond what the links need
