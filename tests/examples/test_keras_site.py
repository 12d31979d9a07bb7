"""TensorFlow's workers in the processes of a device, which stay for the second round."""

from __future__ import annotations

import asyncio
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from edge_agent.training import trainer_wire as wire
from edge_agent.training.trainer import Trainer
from edgefl.config import TrainConfig
from edgefl.task import load_task
from edgefl.trees import read_tree, write_tree

FOLDER = Path(__file__).parents[2] / "examples" / "keras_site"


@pytest.mark.soak
@pytest.mark.skipif(find_spec("tensorflow") is None, reason="needs TensorFlow: pip install '.[keras]'")
def test_two_workers_train_for_two_rounds(tmp_path):
    task = load_task(str(FOLDER))
    parameters = task.initial()
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as archive:
        archive.write(FOLDER / "task.py", "task.py")

    async def rounds():
        trainer, now, found = Trainer(), parameters, []
        running = asyncio.create_task(trainer.run())
        try:
            for number in (1, 2):
                with (tmp_path / "model").open("wb") as file:
                    write_tree(now, file)
                done = await trainer.run_request(
                    wire.FitRequest(
                        job="j", round=number, client="cam-1", model=str(tmp_path / "model"), task="task:task",
                        train=TrainConfig(processes=2, epochs=2, batch_size=64, lr=0.5, round=number),
                        bundle=str(tmp_path / "bundle.zip"), options={}, out=str(tmp_path / "out"), memory_limit_mb=0,
                    )
                )  # fmt: skip
                assert (done.weight, done.metrics["train_workers"]) == (1437.0, 2.0)
                change = read_tree((tmp_path / "out").read_bytes())
                now = {name: now[name] + change[name] for name in now}
                found.append(task.evaluate(now)["accuracy"])
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        return found

    first, second = asyncio.run(rounds())
    assert 0.6 < first < second
