"""Small Flower apps and tasks, in folders that other processes can load from; and a cloud that trains.

Its rounds are real, over the tasks' own local training, in a thread, behind the real HTTPS plane.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgefl.aggregation.server_opt import ServerOptimizer
from edgefl.bundle import unpack_bundle
from edgefl.errors import EdgeflError
from edgefl.protocols.manifest import Bundle, verify
from edgefl.records import Update
from edgefl.rounds import Job, run_rounds
from edgefl.task import import_task
from edgefl.testing import ScriptedFleet
from edgefl.training.local import train_locally
from edgefl.trees import SpooledTree

PYPROJECT = """
[project]
name = "{name}"
version = "1"
[tool.flwr.app]
publisher = "test"
[tool.flwr.app.components]
serverapp = "{name}.server_app:app"
clientapp = "{name}.client_app:app"
[tool.flwr.app.config]
rounds = 2
nested.rate = 0.5
"""

FEDAVG = """
    import numpy as np
    from flwr.app import ArrayRecord
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg

    app = ServerApp()

    @app.main()
    def main(grid, context):
        arrays = ArrayRecord([np.zeros(2)])
        FedAvg().start(grid=grid, initial_arrays=arrays, num_rounds=context.run_config["rounds"])
"""

ADDS = """
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train(message, context):
        part = context.node_config["partition-id"]
        arrays = [array + 1 + part for array in message.content["arrays"].to_numpy_ndarrays()]
        metrics = {"num-examples": 1 + part, "train_loss": float(part)}
        return Message(RecordDict({"a": ArrayRecord(arrays), "m": MetricRecord(metrics)}), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        value = float(message.content["arrays"].to_numpy_ndarrays()[0][0])
        return Message(RecordDict({"m": MetricRecord({"num-examples": 1, "value": value})}), reply_to=message)
"""


MODULE = """
import dataclasses
import os
import signal
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgefl import FitResult, Task


def load(part="0", parts="1", empty="", infinite="", deadly="", deaths="1"):
    number = int(part)
    if part == deadly.partition("@")[0]:
        _die_sometimes(Path(deadly.partition("@")[2]), int(deaths))
    count = 0 if part == empty else 1 + 5 * number % 17
    inputs = torch.from_numpy(np.random.default_rng(number).normal(size=(count, 4)))
    if part == infinite:
        inputs[0] = torch.inf
    return inputs, (inputs.sum(1) > 0).long()


def _die_sometimes(folder, deaths):
    died = len(list(folder.iterdir()))
    if died < deaths:
        (folder / str(died)).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def load_held_out():
    inputs = torch.from_numpy(np.random.default_rng(99).normal(size=(50, 4)))
    return inputs, (inputs.sum(1) > 0).long()


def make(*layers):
    return nn.Sequential(nn.Linear(4, 8), *layers, nn.Tanh(), nn.Linear(8, 2)).double()


def frozen():
    model = make()
    model[0].weight.requires_grad_(False)
    return model


def accuracy(outputs, targets):
    return (outputs.argmax(1) == targets).double().mean().item()


def fit(parameters, config, options):
    return FitResult(tree={"w": np.full(2, float(options["part"]))}, weight=1.0)


def weighted(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets, weight=torch.tensor([1.0, 3.0]).double())


task = Task(name="small", model=make, loss=nn.functional.cross_entropy, train_data=load, test_data=load_held_out,
            metrics={"accuracy": accuracy})
dropout = dataclasses.replace(task, model=lambda: make(nn.Dropout(0.5)))
norm = dataclasses.replace(task, model=lambda: make(nn.BatchNorm1d(8)))
half = dataclasses.replace(task, model=frozen)
summed = dataclasses.replace(task, loss=weighted)
adam = dataclasses.replace(task, optimizer=lambda parameters, lr: torch.optim.Adam(parameters, lr))
own_fit = Task(name="own", initial=lambda: {"w": np.zeros(2)}, fit=fit)
partless = dataclasses.replace(task, train_data=lambda: load())
"""


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the folder of a task by its name in the module."""

    def folder(name: str) -> Path:
        path = tmp_path_factory.getbasetemp() / f"tasks-{name}"
        if not path.exists():
            path.mkdir()
            (path / "small_tasks.py").write_text(MODULE)
            (path / "pyproject.toml").write_text(f'[tool.edgefl]\ntask = "small_tasks:{name}"\n')
        return path

    return folder


@pytest.fixture
def make_app(tmp_path, monkeypatch) -> Callable[..., Path]:
    """Write an app whose server adds up what its clients send; give either part to replace it."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def make(server: str = FEDAVG, client: str = ADDS, name: str = "adder", pyproject: str = PYPROJECT) -> Path:
        folder = tmp_path / name
        (folder / name).mkdir(parents=True)
        (folder / "pyproject.toml").write_text(pyproject.format(name=name))
        (folder / name / "__init__.py").touch()
        (folder / name / "server_app.py").write_text(textwrap.dedent(server))
        (folder / name / "client_app.py").write_text(textwrap.dedent(client))
        return folder

    return make


@pytest.fixture
def adder_client() -> str:
    return ADDS


@pytest.fixture(autouse=True)
def unchanged_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


TORCH_TASK = """
import numpy as np
import torch
from edgefl import Task

def data(shift="0"):
    inputs = np.random.default_rng(int(shift)).normal(size=(60, 4)).astype(np.float32)
    return inputs, (inputs[:, 0] > 0).astype(np.int64)

def held_out():
    return data("9")

def accuracy(outputs, targets):
    return (outputs.argmax(1) == targets).float().mean().item()

task = Task(name="signs", model=lambda: torch.nn.Linear(4, 2), loss=torch.nn.functional.cross_entropy,
            train_data=data, test_data=held_out, metrics={"accuracy": accuracy})
"""

PLAIN_TASK = """
import numpy as np
from edgefl import FitResult, Task

def fit(parameters, config, options):
    return FitResult(tree={"w": np.ones(2, np.float32)}, weight=1.0, metrics={"train_loss": 0.5})

task = Task(name="plain", initial=lambda: {"w": np.zeros(2, np.float32)}, fit=fit)
"""


def write_task(folder, source, module):
    folder.mkdir()
    (folder / f"{module}.py").write_text(source)
    (folder / "pyproject.toml").write_text(f'[tool.edgefl]\ntask = "{module}:task"\n')
    return folder


@pytest.fixture
def torch_task(tmp_path):
    return write_task(tmp_path / "torch_task", TORCH_TASK, "signs_task")


@pytest.fixture
def wide_task(tmp_path):
    """`torch_task` with a model that is large enough to be smaller in int8."""
    wide = "nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))"
    code = TORCH_TASK.replace("torch.nn.Linear(4, 2)", wide.replace("nn.", "torch.nn."))
    return write_task(tmp_path / "torch_task", code, "signs_task")


@pytest.fixture
def plain_task(tmp_path):
    return write_task(tmp_path / "plain_task", PLAIN_TASK, "plain_task")


class Trainers:
    """Runs each submitted job with two clients; `gate` holds every round after the first until it is set."""

    def __init__(self, plane):
        self.plane = plane
        self.gate = threading.Event()
        self.gate.set()
        self.threads = []
        plane.jobs.started = self.start

    def start(self, job):
        self.threads.append(threading.Thread(target=self.run, args=(job,), name=job))
        self.threads[-1].start()

    def run(self, job):
        jobs, blobs = self.plane.jobs, self.plane.blobs
        row = jobs.load(job)
        bundle = verify(row.bundle, Bundle, self.plane.key.public_key())
        folder = self.plane.folder / job
        unpack_bundle(blobs.path(bundle.blob.sha256), folder)
        task = import_task(bundle.task, folder)

        def train(name):
            def answer(plan):
                options = {"shift": name} if task.train_data is not None else {}
                done = train_locally(task, plan.parameters, plan.train, options=options, round=plan.round, client=name)
                return Update(
                    job=job, round=plan.round, device=name, tree=done.tree, weight=done.weight, metrics=done.metrics
                )

            return answer

        fleet = ScriptedFleet({name: train(name) for name in ("1", "2")})
        step = ServerOptimizer(row.config.server, gradient=False, buffers=row.buffers)
        try:
            start = SpooledTree(blobs.path(row.model.sha256))
            rounds = run_rounds(Job(id=job, config=row.config, step=step), fleet, start)
            for outcome in rounds:
                jobs.open_round(job, outcome.round, ["1", "2"])
                jobs.finish_round(outcome, blobs.put_tree(outcome.parameters), None)
                assert self.gate.wait(20)
                if jobs.get(job)["state"] != "running":
                    return
            jobs.end(job, "done")
        except EdgeflError as error:
            jobs.end(job, "failed", str(error))


@pytest.fixture
def trainers(http_plane) -> Iterator[Trainers]:
    one = Trainers(http_plane)
    yield one
    one.gate.set()
    for thread in one.threads:
        thread.join(20)


@pytest.fixture
def on_terminal(http_plane) -> Callable[..., str]:
    """`on_terminal(*command, columns=80)`: what `edgefl` prints on a terminal of this width, without its styles."""

    def run(*command: object, columns: int = 80) -> str:
        ours, theirs = pty.openpty()
        env = {"EDGEFL_CREDENTIALS": str(http_plane.credentials), "COLUMNS": str(columns), "TERM": "xterm"}
        arguments = [sys.executable, "-P", "-m", "edgefl", *map(str, command)]
        with subprocess.Popen(
            arguments, stdin=theirs, stdout=theirs, stderr=subprocess.STDOUT, env=os.environ | env
        ) as process:
            os.close(theirs)
            shown = b""
            with contextlib.suppress(OSError):  # EIO: the process has closed the terminal
                while part := os.read(ours, 1 << 16):
                    shown += part
            os.close(ours)
        assert process.returncode == 0, shown
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()).replace("\r\n", "\n")

    return run
