"""A frozen backbone on real processes: rounds move the head alone, also over kills, and as in a simulation."""

import numpy as np

import edgefl
from edgefl.config import JobConfig, from_dict
from edgefl.models.session import open_session
from edgefl.operator.client import CloudClient, load_credentials
from edgefl.operator.publish import export, parameters_of
from edgefl.operator.run import WatchCallbacks, submit, watch
from edgefl.simulation.world.names import Names
from edgefl.task import load_task
from edgefl.training.local import initial_parameters
from edgefl.trees import SpooledTree, encoded_bytes

TASK = """
import torch
from torch import nn

from edgefl import Task


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, 500), nn.ReLU(), nn.Linear(500, 8), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, 2)
        self.body.requires_grad_(False)

    def forward(self, inputs):
        return self.head(self.body(inputs))


def data(part="9", parts="1"):
    inputs = torch.randn(64, 20, generator=torch.Generator().manual_seed(int(part)))
    return inputs, (inputs.sum(1) > 0).long()


task = Task(name="backbone", model=Net, loss=nn.functional.cross_entropy, train_data=data, test_data=data)
"""
ROUNDS = 3
CONFIG = from_dict(
    JobConfig,
    {
        "rounds": {"count": ROUNDS, "clients": 2, "quorum": 2},
        "train": {"schedule": "cosine", "warmup_rounds": 2},
        "server": {"optimizer": "AdamW", "lr": 0.01, "options": {"weight_decay": 0.1}},
    },
)


def task_folder(tmp_path):
    folder = tmp_path / "backbone"
    folder.mkdir()
    (folder / "backbone.py").write_text(TASK)
    (folder / "pyproject.toml").write_text('[tool.edgefl]\ntask = "backbone:task"\n')
    return folder


def test_rounds_move_the_head_alone_whatever_is_killed(embedded_fleet, tmp_path):
    fleet, folder = embedded_fleet, task_folder(tmp_path)
    names = list(Names(2))
    for number, name in enumerate(names):
        fleet.add_agent(name, part=number, parts=2)
    out = tmp_path / "model.safetensors"
    with CloudClient(fleet.url, load_credentials(fleet.credentials)) as client:
        job = submit(client, str(folder), load_task(str(folder)), CONFIG)

        def disturb(outcome):
            if outcome.round == 1:
                fleet.agents[names[0]].kill()
                fleet.restart_agent(names[0], part=0, parts=2)

        result = watch(client, job, load_task(str(folder)), WatchCallbacks(on_round=disturb), out=out)
        assert parameters_of(client, client.job(job), tmp_path).read_bytes() == out.read_bytes()
    start = initial_parameters(load_task(str(folder)))
    frozen = {name for name in start if name.startswith("body") and name.rpartition(".")[2] in {"weight", "bias"}}
    moving = encoded_bytes({name: array for name, array in start.items() if name not in frozen})
    once = encoded_bytes({name: start[name] for name in frozen})
    assert result.rounds[0].down_bytes >= 2 * (moving + once)
    assert all(one.down_bytes < once for one in result.rounds[1:])
    assert [one.up_bytes for one in result.rounds] == [2 * moving] * ROUNDS
    trained = SpooledTree(out)
    assert all(np.array_equal(trained[name], start[name]) for name in frozen)
    assert not np.array_equal(trained["head.weight"], start["head.weight"])
    simulated = edgefl.simulate(str(folder), clients=2, engine="loop", config=CONFIG)
    for name, array in simulated.parameters.items():
        np.testing.assert_allclose(trained[name], array, rtol=0, atol=1e-6)
    assert simulated.rounds[1].down_bytes == 2 * moving
    made = export(load_task(str(folder)), out, tmp_path, compression="none", max_drop=0)
    assert open_session(made.path).run(None, {"input": np.zeros((1, 20), np.float32)})[0].shape == (1, 2)
