"""Training in parts on real processes gives the model of unsplit training: in each shape, and over kills."""

import dataclasses

import numpy as np
import pytest

from edgefl.aggregation import make_rule
from edgefl.config import JobConfig, load_config
from edgefl.records import Update
from edgefl.task import load_task
from edgefl.training.local import initial_parameters, train_locally
from tests.e2e.conftest import TASKS
from tests.e2e.split_fleet import SPLIT, split_server


def unsplit(rounds, parts, **train):
    """Return the model of federated rounds of the whole model, computed here."""
    chosen = {**SPLIT, **{f"train.{name}": value for name, value in train.items()}}
    settings = [f"{name}={value}" for name, value in chosen.items() if name != "train.mode" and ".split" not in name]
    config, task = load_config(JobConfig, settings=settings).train, load_task(str(TASKS / "split"))
    model = initial_parameters(task)
    for number in range(1, rounds + 1):
        rule = make_rule("mean", model)
        for device, part in parts.items():
            found = train_locally(
                task,
                model,
                dataclasses.replace(config, round=number),
                options={"part": part},
                round=number,
                client=device,
            )
            rule.add(Update(job="job", round=number, device=device, tree=found.tree, weight=found.weight))
        mean = rule.result()
        model = {name: one + mean[name].astype(one.dtype) for name, one in model.items()}
    return model


def assert_close(one, other, tolerance=1e-5):
    assert set(one) == set(other)
    for name in other:
        assert np.abs(np.asarray(one[name]) - np.asarray(other[name])).max() <= tolerance, name


@pytest.mark.soak
def test_rounds_in_parts_give_the_model_of_rounds_without_a_split(embedded_fleet):
    fleet = embedded_fleet
    fleet.add_agent("device-0", part=0)
    with split_server(fleet) as server:
        shape = {"split.last_cut": "second", "split.micro_batches": 3}
        result, parts = fleet.run_task("split", *server.settings(**shape), rounds=2)
        assert_close(parts, unsplit(2, {"device-0": "0"}))
        assert result["rounds"][-1]["metrics"]["accuracy"] > 0.3  # evaluated by the operator, on the whole model


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_kills_of_every_side_change_nothing(embedded_fleet):
    """SIGKILL of the training process, of the server, and of a device with its trainer, each in mid-training."""
    fleet = embedded_fleet
    agents = [fleet.add_agent(f"device-{part}", part=part, wait_s=0.05) for part in range(2)]
    with split_server(fleet) as server:
        settings = server.settings(**{"epochs": 4, "split.checkpoint_steps": 3, "split.last_cut": "second"})
        run = fleet.start_run("split", *settings, rounds=2)
        seen = server.process.wait_for("split.up")
        server.wait_for_checkpoint(1)
        for child in server.trainers():
            child.kill()
        seen = server.process.wait_for("split.ended", after=seen)
        server.process.wait_for("split.up", after=seen)
        server.process.kill()
        server.start()
        server.wait_for_checkpoint(2)
        agents[0].kill()
        fleet.restart_agent("device-0", part=0, wait_s=0.05)
        wanted = unsplit(2, {"device-0": "0", "device-1": "1"}, epochs=4)
        assert_close(fleet.finish_run(run, 900)[1], wanted)
        server.wait_until_empty()
