"""A round's times, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgefl.config import TrainConfig, from_dict
from edgefl.records import Plan
from edgefl.simulation.world.devices import Devices, DevicesConfig
from edgefl.simulation.world.names import Names
from edgefl.simulation.world.schedule import Schedule, make_schedule
from edgefl.trees import encoded_bytes

TREE = {"w": np.zeros(250_000, np.float32)}  # a megabyte, 8 Mbit
EXACT = {"downlink_mbps": {"mean": 8.0}, "uplink_mbps": {"mean": 4.0}, "rtt_s": {"mean": 0.5}, "speed": {"mean": 50.0}}
NAMES = Names(4)
SIZES = (100, 50, 0, 200)


def schedule(settings: dict[str, Any], *, deadline_s: float = 600.0, start_s: float = 0.0) -> Schedule:
    train = TrainConfig(epochs=2)
    plan = Plan(job="job", round=1, parameters=TREE, clients=tuple(NAMES), train=train, deadline_s=deadline_s)
    devices = Devices(from_dict(DevicesConfig, {**EXACT, **settings}), NAMES)
    return make_schedule(devices, plan, lambda client: SIZES[NAMES.index(client)], start_s)


def test_arrivals_by_hand() -> None:
    seen = schedule({}, start_s=1000.0)
    moved_s = 8 * encoded_bytes(TREE) / 1e6 / 8  # down; up takes twice that
    by_hand = {
        "client-2": 1000 + 0.5 + moved_s + 0.5,  # no data: it says so, and sends nothing
        "client-1": 1000 + 0.5 + moved_s + 2 + 0.5 + 2 * moved_s,  # 50 samples * 2 epochs / 50 a second
        "client-0": 1000 + 0.5 + moved_s + 4 + 0.5 + 2 * moved_s,
        "client-3": 1000 + 0.5 + moved_s + 8 + 0.5 + 2 * moved_s,
    }
    assert list(seen.arrivals) == list(by_hand)
    assert dict(seen.arrivals) == pytest.approx(by_hand)
    assert (seen.end_s, seen.late, seen.lost, seen.refused) == (1600.0, (), {}, {})


def test_who_would_answer_after_the_deadline_is_late() -> None:
    seen = schedule({}, deadline_s=10.0)
    assert (tuple(seen.arrivals), seen.late) == (("client-2", "client-1", "client-0"), ("client-3",))


def test_who_drops_out_or_leaves_is_lost() -> None:
    gone = schedule({"availability": {"dropout": 1.0}})
    assert (gone.arrivals, set(gone.lost)) == ({}, set(NAMES))
    whole = schedule({}).arrivals
    assert all(0 < silent_s < whole[client] for client, silent_s in gone.lost.items())
    window = {"kind": "diurnal", "scatter": 0.0, "share": 0.25}  # until 6:00
    leaves = schedule({"availability": window}, start_s=6 * 3600 - 10.0)
    assert leaves.lost == {"client-3": 6 * 3600.0}
    beyond = schedule({"availability": window}, start_s=6 * 3600 - 10.0, deadline_s=9.0)
    assert (beyond.lost, beyond.late) == ({}, ("client-3",))


def test_a_device_without_the_memory_says_so_at_once() -> None:
    seen = schedule({"memory_mb": {"mean": 3.5}})
    assert set(seen.arrivals.values()) == {0.5}
    assert seen.refused["client-1"] == "training needs 3.8 MB, 4 times the model; the device has 3.5 MB"


def test_what_is_frozen_is_fetched_once_and_held_once() -> None:
    train = TrainConfig(epochs=2)
    plan = Plan(
        job="job",
        round=1,
        parameters=TREE,
        clients=tuple(NAMES),
        train=train,
        deadline_s=600.0,
        frozen={"f": TREE["w"]},
    )

    def times(memory_mb: float) -> Schedule:
        devices = Devices(from_dict(DevicesConfig, {**EXACT, "memory_mb": {"mean": memory_mb}}), NAMES)
        return make_schedule(devices, plan, lambda client: SIZES[NAMES.index(client)], 0.0, {"client-0"})

    without = schedule({}).arrivals
    fetch_s = 8 * encoded_bytes({"f": TREE["w"]}) / 1e6 / 8
    seen = times(64.0).arrivals
    later = {client: seen[client] - without[client] for client in NAMES}
    assert later == pytest.approx({"client-0": 0.0, "client-1": fetch_s, "client-2": fetch_s, "client-3": fetch_s})
    assert "needs 4.8 MB, 4 times what is trained, and what is frozen once" in times(4.0).refused["client-1"]
