"""Measures the row of a Flower app in Keras, by the commands that its user would type."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from edgefl.errors import ConfigError, ProcessFailed
from edgefl.local_fleet import LocalFleet
from edgefl.trees import SpooledTree, Tree
from tests.kinds.compared import refusal, same
from tests.kinds.kinds import Kind
from tests.kinds.page import COLUMNS, NOTHING, YES, Row

CLIENTS, ROUNDS, TOLERANCE, LIMIT_S = 2, 2, 1e-4, 1500.0
LOOP, STACKED, POOL, DEVICES, PUBLISH, INT8, *_ = COLUMNS
PLAIN = """
import sys
import numpy as np
from keras_app.task import initial_weights, load_part, make_model, train

out, clients, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
weights, model = initial_weights(0, 0.1), make_model(0, 0.1)
for _ in range(rounds):
    trained, counts = [], []
    for part in range(clients):
        data = load_part(part, clients)
        model.set_weights(weights)
        train(model, data, epochs=1, batch=16)
        trained.append(model.get_weights())
        counts.append(len(data[1]))
    weights = [np.average(one, axis=0, weights=counts) for one in zip(*trained)]
np.savez(out, **{str(number): one for number, one in enumerate(weights)})
"""


class _App:
    """One Flower app under measurement."""

    def __init__(self, kind: Kind, fleet: LocalFleet) -> None:
        self._fleet, self._name = fleet, kind.name
        self._folder = fleet.folder / "kinds" / kind.name
        shutil.copytree(kind.folder, self._folder, ignore=shutil.ignore_patterns("__pycache__"))
        self._made = fleet.folder / "made" / kind.name
        self._made.mkdir(parents=True)
        self._wanted: Tree = {}

    def row(self) -> Row:
        """Return the cells by column."""
        cells = dict.fromkeys(COLUMNS, NOTHING)
        cells[LOOP] = self._cell(self._loop)
        cells[STACKED] = self._cell(lambda: self._like_loop("stacked"))
        cells[POOL] = self._cell(lambda: self._like_loop("pool"))
        cells[DEVICES] = self._cell(self._on_devices)
        cells[PUBLISH] = self._cell(lambda: self._published("none"))
        cells[INT8] = self._cell(lambda: self._published("int8"))
        return cells

    def _cell(self, step) -> str:
        try:
            step()
        except ConfigError as error:
            return refusal(error, self._fleet.folder)
        return YES

    def _command(self, *parts: str | Path | int) -> None:
        """Run a command; raises ConfigError with the words of its refusal, ProcessFailed if it ended otherwise."""
        try:
            self._fleet.command(*parts, timeout_s=LIMIT_S)
        except ProcessFailed as error:
            last = str(error).strip().splitlines()[-1]
            _, is_refusal, words = last.partition("error: ")
            if not is_refusal:
                raise
            raise ConfigError(words) from error

    def _ran(self, *parts: str | Path | int) -> Tree:
        out, told = self._made / "parameters.safetensors", self._made / "result.json"
        self._command(*parts, "--rounds", ROUNDS, "--out", out, "--json", told)
        assert [one["admitted"] for one in json.loads(told.read_text())["rounds"]] == [CLIENTS] * ROUNDS
        return {name: np.array(one) for name, one in SpooledTree(out).items()}

    def _simulated(self, engine: str) -> Tree:
        return self._ran("simulate", self._folder, "--engine", engine, "--clients", CLIENTS)

    def _loop(self) -> None:
        plain = self._made / "plain.npz"
        command = [sys.executable, "-c", PLAIN, plain, str(CLIENTS), str(ROUNDS)]
        subprocess.run(command, check=True, cwd=self._folder, timeout=LIMIT_S, capture_output=True)
        self._wanted = self._simulated("loop")
        same(self._wanted, dict(np.load(plain)), TOLERANCE, "loop against plain Keras")

    def _like_loop(self, engine: str) -> None:
        same(self._simulated(engine), self._wanted, TOLERANCE, f"{engine} against loop")

    def _on_devices(self) -> None:
        same(self._ran("run", self._folder, "--cloud", self._fleet.url), self._wanted, TOLERANCE, "devices")

    def _published(self, compression: str) -> None:
        source = ("--task", self._folder, "--parameters", self._made / "parameters.safetensors")
        self._command("models", "publish", self._name, *source, "--compress", compression, "--cloud", self._fleet.url)


def measured_app(kind: Kind, fleet: LocalFleet) -> Row:
    """Measure a Flower app on a running fleet of `start_devices`."""
    return _App(kind, fleet).row()
