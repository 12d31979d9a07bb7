"""Small Flower apps, written into folders of their own."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

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
