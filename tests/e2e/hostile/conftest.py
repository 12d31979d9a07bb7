"""What is done to a door, and the proof that it was harmless: a round of three devices, right and in time."""

import numpy as np
import pytest

DEVICES = {"a": (1.0, 1), "b": (4.0, 2), "c": (10.0, 5)}  # delta, weight
MEAN = (1 * 1.0 + 2 * 4.0 + 5 * 10.0) / 8
DEADLINE_S = 5


def pytest_collection_modifyitems(items):
    for item in items:
        if "/hostile/" in str(item.path):
            item.add_marker(pytest.mark.soak)


@pytest.fixture
def three(tmp_path):
    """Enrol and start three devices; gives the options that each was started with."""

    def start(fleet):
        data = {name: {"delta": delta, "weight": weight, "calls": tmp_path / f"{name}.calls"}
                for name, (delta, weight) in DEVICES.items()}  # fmt: skip
        for name, options in data.items():
            fleet.add_agent(name, **options)
        return data

    return start


@pytest.fixture
def round_is_right():
    """Run one round of the three devices; all must be in it before its deadline of 5 s."""

    def check(fleet):
        settings = ("rounds.clients=3", "rounds.quorum=3", f"rounds.deadline_s={DEADLINE_S}")
        result, model = fleet.run_task("numbers", *settings)
        np.testing.assert_allclose(model["w"], np.full(3, MEAN), rtol=1e-6)
        assert [entry["admitted"] for entry in result["rounds"]] == [3]

    return check
