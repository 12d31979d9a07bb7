"""Measures a row of the table: one kind of model through simulation, devices, publishing and serving.

Invariant: a cell is `yes` only if the result was compared and equal; a wrong number is an AssertionError, and an
exception that is no refusal of a model, such as a process that was lost, is raised as it is.
"""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import httpx
import numpy as np

from edgefl.config import JobConfig, from_dict
from edgefl.errors import AccuracyGateFailed, ConfigError, JobFailed, ParityError, RolloutFailed, TaskError
from edgefl.local_fleet import LocalFleet
from edgefl.operator.client import CloudClient, load_credentials
from edgefl.operator.publish import export, publish
from edgefl.operator.run import run
from edgefl.simulation.simulate import simulate
from edgefl.task import Task, load_task
from edgefl.training.local import initial_parameters
from edgefl.trees import SpooledTree, Tree
from tests.kinds.kinds import TASKS, Kind
from tests.kinds.page import COLUMNS, NOTHING, YES, Row
from tests.kinds.reference import Prediction, averaged, predicted

CLIENTS, ROUNDS, SEEN_ROWS, MAX_DROP, ROLLOUT_S = 2, 2, 4, 0.05, 500.0
LOOP, STACKED, POOL, DEVICES, PUBLISH, INT8, SERVE, PREDICTION = COLUMNS
REFUSALS = (AccuracyGateFailed, ConfigError, JobFailed, ParityError, RolloutFailed, TaskError)


def start_devices(fleet: LocalFleet) -> None:
    """Start a cloud and two devices, which hold the two parts of every kind's data.

    They have the names of simulated clients, by which the random numbers of training are drawn.
    """
    fleet.start()
    for part in range(CLIENTS):
        fleet.enroll(f"client-{part}")
        options = ("--data", f"part={part}", "--data", f"parts={CLIENTS}")
        fleet.start_agent(f"client-{part}", *options, env={"OMP_NUM_THREADS": "1"})
    for agent in fleet.agents.values():
        agent.wait_for("mqtt.up")


def refusal(error: Exception, folder: Path) -> str:
    """Return a refusal's words, without what differs from machine to machine: paths, bytes, digits of what was lost."""
    text = re.sub(r"\d+\.\d{4}", "N", str(error).replace(f"{folder}/", ""))
    return re.sub(r"\d+(?= bytes|$)", "N", " ".join(text.replace("`", "'").split()))


def same(seen: Tree, wanted: Tree, within: float, what: str) -> None:
    """Raise AssertionError unless two sets of arrays are equal up to rounding."""
    assert set(seen) == set(wanted), f"{what}: {sorted(seen)} instead of {sorted(wanted)}"
    for name, array in wanted.items():
        one, other = np.asarray(seen[name]), np.asarray(array)
        assert one.shape == other.shape, f"{what}: {name} has the shape {one.shape} instead of {other.shape}"
        one, other = one.astype(np.float64), other.astype(np.float64)
        allowed = within * max(1.0, float(np.abs(other).max(initial=0)))
        assert float(np.abs(one - other).max(initial=0)) <= allowed, f"{what}: {name} differs"  # NaN differs


@dataclass
class Measuring:
    """One kind under measurement."""

    kind: Kind
    fleet: LocalFleet
    client: CloudClient

    def __post_init__(self) -> None:
        self.folder = self.fleet.folder / "kinds" / self.kind.name
        shutil.copytree(TASKS, self.folder, ignore=shutil.ignore_patterns("__pycache__"))
        (self.folder / "pyproject.toml").write_text(f'[tool.edgefl]\ntask = "{self.kind.task}"\n', encoding="utf-8")
        self.made = self.fleet.folder / "made" / self.kind.name
        self.made.mkdir(parents=True)
        self.task: Task = load_task(str(self.folder))
        self.wanted: Tree = {}

    def row(self) -> Row:
        """Return the cells by column."""
        cells = dict.fromkeys(COLUMNS, NOTHING)
        cells[LOOP] = self._cell(self._loop)
        if cells[LOOP] == YES:
            cells[STACKED] = self._cell(lambda: self._like_loop("stacked"))
            cells[POOL] = self._cell(lambda: self._like_loop("pool"))
            cells[DEVICES] = self._cell(self._on_devices)
            cells[PUBLISH] = self._cell(self._published)
            cells[SERVE] = self._cell(self._served) if cells[PUBLISH] == YES else NOTHING
            cells[PREDICTION] = self._cell(self._predicted) if cells[SERVE] == YES else NOTHING
            cells[INT8] = self._cell(self._published_as_int8)
        return cells

    def _cell(self, step: Callable[[], str | None]) -> str:
        try:
            return step() or YES
        except REFUSALS as error:
            return refusal(error, self.fleet.folder)

    @property
    def _config(self) -> dict:
        return {
            "rounds": {"count": ROUNDS, "clients": CLIENTS, "quorum": CLIENTS},
            "train": {"lr": self.kind.lr, "epochs": self.kind.epochs, "batch_size": 64},
        }

    @property
    def _parameters(self) -> Path:
        return self.made / "parameters.safetensors"

    def _simulated(self, engine: str, out: Path | None = None) -> Tree:
        result = simulate(self.folder, engine=engine, clients=CLIENTS, config=self._config, out=out)
        assert [one.admitted for one in result.rounds] == [CLIENTS] * ROUNDS
        assert all(np.isfinite(value) for value in result.final.values()), result.final
        assert result.engine == engine
        return result.parameters

    def _loop(self) -> None:
        self.wanted = self._simulated("loop", self._parameters)
        if self.task.model is not None and not self.kind.is_random:
            start = initial_parameters(self.task)
            plain = averaged(self.task, start, rounds=ROUNDS, epochs=self.kind.epochs, lr=self.kind.lr)
            same(self.wanted, plain, self.kind.tolerance, "loop against plain PyTorch")

    def _like_loop(self, engine: str) -> None:
        same(self._simulated(engine), self.wanted, self.kind.tolerance, f"{engine} against loop")

    def _on_devices(self) -> None:
        out = self.made / "devices.safetensors"
        config = from_dict(JobConfig, self._config)
        result = run(str(self.folder), cloud=self.fleet.url, config=config, credentials=self.fleet.credentials, out=out)
        assert [one.admitted for one in result.rounds] == [CLIENTS] * ROUNDS
        same(SpooledTree(out), self.wanted, self.kind.tolerance, "devices against loop")

    def _publish(self, compression: str) -> dict:
        exported = export(self.task, self._parameters, self.made, compression=compression, max_drop=MAX_DROP)
        return publish(self.client, self.kind.name, exported)

    def _published(self) -> None:
        assert self._publish("none")["version"] == 1

    def _published_as_int8(self) -> str | None:
        release = self._publish("int8")
        return None if release["compression"] else refusal(Exception(release["note"]), self.fleet.folder)

    def _served(self) -> None:
        rollout = self.client.start_rollout(self.kind.name, 1)
        *_, last = self.client.rollout_events(rollout["id"], within_s=ROLLOUT_S)
        assert last["state"] in {"done", "failed"}, f"no end of the rollout within {ROLLOUT_S:g} s: {last}"
        if last["state"] == "failed":
            raise RolloutFailed("; ".join(str(one["reason"] or one["state"]) for one in last["devices"]))
        self.answers = [
            (one, self._answer(device["serving_url"], one))
            for one in self._predictions() for device in self.client.devices()
        ]  # fmt: skip

    def _predictions(self) -> list[Prediction]:
        if self.task.model is None:
            module: ModuleType = importlib.import_module(self.kind.task.partition(":")[0])
            inputs, outputs = module.held_out_and_predicted(SpooledTree(self._parameters))
            return [Prediction({"X": inputs[:SEEN_ROWS]}, {name: one[:SEEN_ROWS] for name, one in outputs.items()})]
        return [predicted(self.task, self.wanted, SEEN_ROWS, size) for size in (None, *self.kind.sizes)]

    def _answer(self, url: str, prediction: Prediction) -> dict[str, np.ndarray]:
        with httpx.Client(base_url=f"{url}/v2/models/{self.kind.name}", trust_env=False, timeout=60) as http:
            types = {one["name"]: one["datatype"] for one in http.get("").json()["inputs"]}
            assert set(types) == set(prediction.inputs)
            inputs = [
                {"name": name, "shape": one.shape, "datatype": types[name], "data": one.ravel().tolist()}
                for name, one in prediction.inputs.items()
            ]
            answer = http.post("/infer", json={"inputs": inputs})
        if answer.is_error:
            raise RolloutFailed(answer.json()["error"])
        return {one["name"]: np.array(one["data"]).reshape(one["shape"]) for one in answer.json()["outputs"]}

    def _predicted(self) -> None:
        for prediction, answer in self.answers:
            same(answer, prediction.outputs, self.kind.tolerance, f"{self.kind.name}: prediction")


def measured(kind: Kind, fleet: LocalFleet) -> Row:
    """Measure one kind on a running fleet of `start_devices`."""
    with CloudClient(fleet.url, load_credentials(fleet.credentials)) as client:
        return Measuring(kind, fleet, client).row()
