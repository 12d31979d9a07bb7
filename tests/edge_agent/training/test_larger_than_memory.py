"""A Dataset larger than the memory limit trains in the real trainer process; the same data as arrays do not."""

from __future__ import annotations

import asyncio
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edge_agent.training import trainer_wire as wire
from edge_agent.training.trainer import Trainer
from edgefl.config import TrainConfig
from edgefl.errors import TaskError
from edgefl.trees import read_tree, write_tree

LIMIT_MB = 1024
WIDTH = 1 << 18  # float32: a megabyte per sample
TASK = """
    import numpy as np
    import torch

    from edgefl import Task

    WIDTH = 1 << 18

    class Lazy(torch.utils.data.Dataset):
        def __init__(self, number, how):
            self.number, self.how = number, how

        def __len__(self):
            return self.number

        def __getitem__(self, n):
            if self.how == "eats":
                np.ones(1 << 28)  # 2 GB
            return np.full(WIDTH, n % 7, np.float32), np.full(1, n % 7, np.float32)

    def load(megabytes, how):
        dataset = Lazy(int(megabytes), how)
        if how != "arrays":
            return dataset
        inputs, targets = zip(*(dataset[n] for n in range(len(dataset))))
        return np.stack(inputs), np.stack(targets)

    task = Task(
        name="lazy", model=lambda: torch.nn.Linear(WIDTH, 1), loss=torch.nn.functional.mse_loss, train_data=load
    )
"""


def request(folder: Path, megabytes: int, how: str, **train: int) -> wire.FitRequest:
    bundle = folder / "bundle.zip"
    with zipfile.ZipFile(bundle, "w") as archive:
        archive.writestr("lazy_task.py", textwrap.dedent(TASK))
    with (folder / "model").open("wb") as file:
        write_tree({"weight": np.zeros((1, WIDTH), np.float32), "bias": np.zeros(1, np.float32)}, file)
    return wire.FitRequest(
        job="j", round=1, client="cam-1", train=TrainConfig(batch_size=16, lr=1e-9, **train),
        model=str(folder / "model"), bundle=str(bundle), task="lazy_task:task",
        options={"megabytes": str(megabytes), "how": how}, out=str(folder / "out"), memory_limit_mb=LIMIT_MB,
    )  # fmt: skip


async def run(fit: wire.FitRequest) -> tuple[wire.WorkDone, int]:
    """Return the answer of a trainer process, and its peak memory in MB."""
    trainer = Trainer()
    idle = asyncio.create_task(trainer.run())
    try:
        done = await trainer.run_request(fit)
        return done, peak_mb_of(trainer.pid)
    finally:
        idle.cancel()
        await asyncio.wait([idle])


def peak_mb_of(pid: int | None) -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    (peak,) = (int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM"))
    return peak


def check(folder: Path, done: wire.WorkDone, peak_mb: int, megabytes: int) -> None:
    assert done.weight == megabytes
    assert peak_mb < LIMIT_MB
    moved = read_tree((folder / "out").read_bytes())
    assert np.isfinite(moved["weight"]).all()
    assert (moved["weight"] > 0).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_larger_than_the_limit_trains(tmp_path, workers):
    megabytes = LIMIT_MB + 256
    check(tmp_path, *asyncio.run(run(request(tmp_path, megabytes, "dataset", workers=workers))), megabytes)


def test_the_same_data_as_arrays_exceed_the_limit(tmp_path):
    with pytest.raises(TaskError, match=r"the task exceeded its memory limit of 1024 MB"):
        asyncio.run(run(request(tmp_path, LIMIT_MB + 256, "arrays")))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_item_that_exceeds_the_limit_is_told_as_such(tmp_path, workers):
    with pytest.raises(TaskError, match=r"the task exceeded its memory limit of 1024 MB"):
        asyncio.run(run(request(tmp_path, 16, "eats", workers=workers)))


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("algorithm", ["fedavg", "fedsgd"])
def test_four_gigabytes_train_within_one(tmp_path, workers, algorithm):
    fit = request(tmp_path, 4096, "dataset", workers=workers, algorithm=algorithm)
    done, peak_mb = asyncio.run(run(fit))
    assert (done.weight, peak_mb < LIMIT_MB) == (4096, True)
