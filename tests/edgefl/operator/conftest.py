"""A cloud that trains: real rounds over the tasks' own local training, in a thread, behind the real HTTPS plane."""

from __future__ import annotations

import threading
from collections.abc import Iterator

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
