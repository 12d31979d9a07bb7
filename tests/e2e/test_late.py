"""An update that comes when its round is over is part of the next one, once, whatever is killed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.e2e.conftest import Fleet
from tests.e2e.test_faults import calls

ROUNDS, WINDOW_S, SLOW_S = 4, 12.0, 18


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_slow_device_counts_one_round_later_and_once(embedded_fleet: Fleet, tmp_path: Path) -> None:
    of = {"a": (1.0, 1.0, 1), "b": (4.0, 2.0, SLOW_S)}  # delta, weight, seconds
    for name, (delta, weight, seconds) in of.items():
        embedded_fleet.add_agent(name, delta=delta, weight=weight, seconds=seconds, calls=tmp_path / f"{name}.calls")
    slow = embedded_fleet.agents["b"]
    run = embedded_fleet.start_run(
        "numbers", "rounds.quorum=1", f"rounds.grace={WINDOW_S}", "rounds.late=next", "rounds.offline_grace_s=60",
        rounds=ROUNDS,
    )  # fmt: skip
    slow.wait_for("update.stored")  # of the first round, in the second
    embedded_fleet.cloud.kill()
    embedded_fleet.start_cloud()
    result, model = embedded_fleet.finish_run(run)
    rounds = result["rounds"]
    late = sum(one.get("late", 0) for one in rounds)
    assert late >= 1
    assert rounds[0].get("late", 0) == 0
    expected, counted = 0.0, 0
    for one in rounds:  # what must come out, by who was counted when
        updates = [of["a"]] + [of["b"]] * (one["admitted"] - 1 + one.get("late", 0))
        assert one["admitted"] >= 1
        counted += len(updates) - 1
        expected += sum(delta * weight for delta, weight, _ in updates) / sum(weight for _, weight, _ in updates)
    np.testing.assert_allclose(model["w"], np.full(3, expected), rtol=1e-6)
    assert calls(tmp_path / "a.calls") == ROUNDS
    assert counted <= calls(tmp_path / "b.calls")  # nothing counts twice
