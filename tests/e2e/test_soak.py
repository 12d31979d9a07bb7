"""Whatever is killed, as often as one likes: the parameters are those of an undisturbed run."""

import random
import time

import numpy as np
import pytest

ROUNDS, KILLS = 30, 15
STOPPED_SHARE = 0.3  # are asked to end, by SIGTERM
DEVICES = {"a": (1.0, 1), "b": (4.0, 2), "c": (10.0, 5)}  # delta, weight
SETTINGS = ("rounds.clients=3", "rounds.quorum=3", "rounds.deadline_s=300", "rounds.wait_s=300")


@pytest.mark.soak
@pytest.mark.parametrize("seed", [1, 2])
def test_random_kills_and_stops_change_nothing_in_the_result(fleet, tmp_path, seed):
    data = {name: {"delta": delta, "weight": weight, "seconds": 0.1, "calls": tmp_path / f"{name}.calls"}
            for name, (delta, weight) in DEVICES.items()}  # fmt: skip
    for name, options in data.items():
        fleet.add_agent(name, **options)
    run = fleet.start_run("numbers", *SETTINGS, rounds=ROUNDS)
    rng = random.Random(seed)  # no secret
    fleet.agents["a"].wait_for("plan.taken")
    num_kills = 0
    while num_kills < KILLS and run.popen.poll() is None:
        time.sleep(rng.uniform(0, 0.6))
        victims = rng.choice([["cloud"], ["a"], ["b"], ["c"], ["cloud", "a"], ["b", "c"]])
        for victim in victims:
            process = fleet.cloud if victim == "cloud" else fleet.agents[victim]
            (process.stop if rng.random() < STOPPED_SHARE else process.kill)()
        for victim in victims:
            num_kills += 1
            if victim == "cloud":
                fleet.start_cloud()
            else:
                fleet.start_agent(victim, *(part for key, value in data[victim].items()
                                            for part in ("--data", f"{key}={value}")))  # fmt: skip
    result, model = fleet.finish_run(run, 300)
    mean = sum(delta * weight for delta, weight in DEVICES.values()) / sum(weight for _, weight in DEVICES.values())
    np.testing.assert_allclose(model["w"], np.full(3, ROUNDS * mean), rtol=1e-6)
    assert model["n"] == ROUNDS
    assert [entry["admitted"] for entry in result["rounds"]] == [3] * ROUNDS
    assert not list((fleet.home / "spool").glob("job-*"))
