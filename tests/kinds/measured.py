"""Measures a row of the table: one kind of model through simulation, devices, publishing and serving.

Invariant: a cell is `yes` only if the result was compared and equal; a wrong number is an AssertionError, and an
exception that is no refusal of a model, such as a process that was lost, is raised as it is.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np

from edgefl.config import JobConfig, from_dict
from edgefl.errors import AccuracyGateFailed, ConfigError, JobFailed, ParityError, RolloutFailed, TaskError
from edgefl.local_fleet import LocalFleet
from edgefl.models.session import open_session
from edgefl.operator.client import CloudClient, load_credentials
from edgefl.operator.publish import export, publish
from edgefl.operator.run import run
from edgefl.simulation.simulate import simulate
from edgefl.task import Task, load_task
from edgefl.training.local import initial_parameters
from edgefl.trees import SpooledTree, Tree
from tests.kinds.compared import refusal, same
from tests.kinds.flower_app import measured_app
from tests.kinds.kinds import TASKS, Kind
from tests.kinds.page import COLUMNS, NOTHING, YES, Row
from tests.kinds.reference import Prediction, averaged, predicted

CLIENTS, ROUNDS, SEEN_ROWS, MAX_DROP, ROLLOUT_S = 2, 2, 4, 0.05, 500.0
SAME_FILE, IN_INT8 = 1e-4, 0.2  # tolerances: of a file here and on a device; of int8, to the library's own outputs
LOOP, STACKED, POOL, DEVICES, PUBLISH, INT8, SERVE, PREDICTION, SERVE_INT8 = COLUMNS
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


@dataclass
class Measuring:
    """One kind under measurement."""

    kind: Kind
    fleet: LocalFleet
    client: CloudClient

    def __post_init__(self) -> None:
        self.folder = self.fleet.folder / "kinds" / self.kind.name
        shutil.copytree(self.kind.folder, self.folder, ignore=shutil.ignore_patterns("__pycache__"))
        if self.kind.folder == TASKS:
            text = f'[tool.edgefl]\ntask = "{self.kind.task}"\n'
            (self.folder / "pyproject.toml").write_text(text, encoding="utf-8")
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
            cells[SERVE] = self._cell(lambda: self._served(1)) if cells[PUBLISH] == YES else NOTHING
            cells[PREDICTION] = self._cell(self._predicted) if cells[SERVE] == YES else NOTHING
            cells[INT8] = self._cell(self._published_as_int8)
            cells[SERVE_INT8] = self._cell(self._served_as_int8) if cells[INT8] == YES else NOTHING
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

    def _published_as_int8(self) -> None:
        release = self._publish("int8")
        assert release["compression"], release
        self.in_int8 = release["version"]

    def _served_as_int8(self) -> None:
        self._served(self.in_int8)
        session = open_session(self.made / "model.int8.onnx")
        names = [one.name for one in session.get_outputs()]
        for prediction, answer in self.answers:
            here = dict(zip(names, session.run(names, dict(prediction.inputs)), strict=True))
            same(answer, here, SAME_FILE, f"{self.kind.name}: the int8 file on a device and here")
            same(answer, prediction.outputs, IN_INT8, f"{self.kind.name}: prediction in int8")

    def _served(self, version: int) -> None:
        rollout = self.client.start_rollout(self.kind.name, version)
        *_, last = self.client.rollout_events(rollout["id"], within_s=ROLLOUT_S)
        assert last["state"] in {"done", "failed"}, f"no end of the rollout within {ROLLOUT_S:g} s: {last}"
        if last["state"] == "failed":
            raise RolloutFailed("; ".join(str(one["reason"] or one["state"]) for one in last["devices"]))
        self.answers = [
            (one, self._answer(device["serving_url"], one))
            for one in self._predictions() for device in self.client.devices()
        ]  # fmt: skip

    def _predictions(self) -> list[Prediction]:
        if self.task.export is not None:
            _, inputs, outputs = self.task.export(SpooledTree(self._parameters))
            [name] = [one.name for one in open_session(self.made / "model.onnx").get_outputs()][-1:]
            told = outputs if isinstance(outputs, dict) else {name: outputs[:, None]}
            return [
                Prediction({self._input(): inputs[:SEEN_ROWS]}, {key: one[:SEEN_ROWS] for key, one in told.items()})
            ]
        return [predicted(self.task, self.wanted, SEEN_ROWS, size) for size in (None, *self.kind.sizes)]

    def _input(self) -> str:
        [node] = open_session(self.made / "model.onnx").get_inputs()
        return str(node.name)

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
    if not kind.task:
        return measured_app(kind, fleet)
    with CloudClient(fleet.url, load_credentials(fleet.credentials)) as client:
        return Measuring(kind, fleet, client).row()
