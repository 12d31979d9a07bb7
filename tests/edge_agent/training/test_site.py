"""Real processes of one machine that train together: exact, killed, cancelled, ended with the trainer."""

from __future__ import annotations

import asyncio
import os
import signal
import textwrap
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_agent.training import trainer_wire as wire
from edge_agent.training.site import SiteSettings, connect, is_shared, listen, num_processes
from edge_agent.training.trainer import Trainer
from edgefl.config import AUTO, TrainConfig
from edgefl.errors import TaskError
from edgefl.task import import_task
from edgefl.training.local import initial_parameters, train_locally
from edgefl.trees import read_tree, write_tree

TASK = """
    import os, time
    import numpy as np, torch
    from torch import nn
    from edgefl import Task

    def data(log="", fault=""):
        global LOG, FAULT
        LOG, FAULT = log, fault
        if fault == "data" and os.environ.get("RANK") == "1":
            raise ValueError("no disk")
        rng = np.random.default_rng(0)
        return rng.random((64, 5)), rng.integers(0, 3, 64)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, rows):
            if self.training and LOG:
                with open(LOG, "a") as file:
                    file.write(f"{os.getpid()}\\n")
                if FAULT == "step" and os.environ.get("RANK") == "1":
                    raise ValueError("no power")
                time.sleep(0.02)
            return self.last(torch.tanh(self.first(rows)))

    task = Task(name="net", model=lambda: Net().double(), loss=nn.functional.cross_entropy, train_data=data,
                eval_data=data)
"""


class Bench:
    """A trainer, and what its requests need."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        (folder / "code").mkdir()
        (folder / "code" / "shared_task.py").write_text(textwrap.dedent(TASK))
        with zipfile.ZipFile(folder / "bundle.zip", "w") as archive:
            archive.write(folder / "code" / "shared_task.py", "shared_task.py")
        self.task = import_task("shared_task:task", folder / "code")
        self.parameters = initial_parameters(self.task)
        with (folder / "model").open("wb") as file:
            write_tree(self.parameters, file)

    def fit(self, number: int, *, log: bool = False, fault: str = "", **train) -> wire.FitRequest:
        if log:
            self.log.write_text("")
        return wire.FitRequest(
            job="j", round=number, client="cam-1", train=TrainConfig(**{"processes": 2, "batch_size": 7} | train),
            model=str(self.folder / "model"), bundle=str(self.folder / "bundle.zip"), task="shared_task:task",
            options={"log": str(self.log), "fault": fault} if log else {}, out=str(self.folder / "out"),
            memory_limit_mb=0,
        )  # fmt: skip

    def is_as_alone(self, number: int, **train) -> bool:
        config = TrainConfig(**{"batch_size": 7} | train)
        alone = train_locally(self.task, self.parameters, config, options={}, round=number, client="cam-1").tree
        together = read_tree((self.folder / "out").read_bytes())
        return all(np.allclose(together[name], alone[name], rtol=0, atol=1e-9) for name in alone)

    def pids(self) -> list[int]:
        return [int(pid) for pid in self.log.read_text().split()]


def with_trainer(bench, until, alive, rounds):
    """Run rounds with a trainer, whose processes end with it."""

    async def inside():
        trainer = Trainer()
        running = asyncio.create_task(trainer.run())
        try:
            async with asyncio.timeout(300):
                await rounds(trainer)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        await until(lambda: not any(alive(pid) for pid in bench.pids()))

    asyncio.run(inside())


def test_processes_train_round_after_round_and_over_a_kill(tmp_path, until, alive):
    """One start, because it takes seconds."""
    bench = Bench(tmp_path)

    async def rounds(trainer):
        first = await trainer.run_request(bench.fit(1, log=True))
        assert first.weight == 64.0
        assert bench.is_as_alone(1)
        workers = set(bench.pids())
        assert len(workers) == 2
        await trainer.run_request(bench.fit(2, log=True))
        assert bench.is_as_alone(2)
        assert set(bench.pids()) == workers  # they stay

        working = asyncio.create_task(trainer.run_request(bench.fit(3, log=True, epochs=3)))
        await until(lambda: len(bench.pids()) > 6)
        os.kill(bench.pids()[-1], signal.SIGKILL)
        await working
        assert bench.is_as_alone(3, epochs=3)

    with_trainer(bench, until, alive, rounds)


@pytest.mark.soak
def test_processes_train_on_whatever_becomes_of_a_round(tmp_path, until, alive):
    """Faults of one process, an evaluation, a cancellation."""
    bench = Bench(tmp_path)

    async def rounds(trainer):
        with pytest.raises(TaskError, match=r"process 1 on 127\.0\.0\.1: .*train_data raised ValueError: no disk"):
            await trainer.run_request(bench.fit(4, log=True, fault="data"))
        with pytest.raises(TaskError, match=r"process 1 on 127\.0\.0\.1: .*local training raised ValueError: no power"):
            await trainer.run_request(bench.fit(5, log=True, fault="step"))
        done = await trainer.run_request(replace(bench.fit(6), evaluate=True))
        assert bench.is_as_alone(6)
        assert (done.evaluation.weight, done.evaluation.fault, done.evaluates) == (64.0, "", False)

        working = asyncio.create_task(trainer.run_request(bench.fit(7, log=True, epochs=500)))
        await until(lambda: len(bench.pids()) > 6)
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        await until(lambda: not any(alive(pid) for pid in bench.pids()))
        await trainer.run_request(bench.fit(8, log=True))
        assert bench.is_as_alone(8)

    with_trainer(bench, until, alive, rounds)


def test_one_process_is_no_site(tmp_path):
    request = Bench(tmp_path).fit(1, processes=1)
    assert not is_shared(request)
    assert is_shared(replace(request, rendezvous="10.0.0.1:29400"))
    assert num_processes(3) == 3
    assert num_processes(AUTO) >= 1


def test_a_leader_connects_wherever_the_folder_is(tmp_path):
    folder = tmp_path / ("deep" * 40)
    folder.mkdir()
    with listen(folder) as listener, connect(folder) as leader:
        trainer, _ = listener.accept()
        leader.sendall(b"here")
        assert trainer.recv(4) == b"here"
        trainer.close()


def test_a_single_machine_stays_on_loopback():
    assert SiteSettings(folder="", processes=2).address == "127.0.0.1"


@pytest.mark.soak
def test_a_site_without_its_other_machines_fails_and_says_what_to_start(tmp_path):
    """The launcher waits for a minute."""
    bench = Bench(tmp_path)
    request = replace(bench.fit(1, processes=1), rendezvous="127.0.0.1:29431", machines=2)

    async def inside():
        trainer = Trainer()
        running = asyncio.create_task(trainer.run())
        try:
            with pytest.raises(
                TaskError, match=r"its 2 machines did not meet at 127\.0\.0\.1:29431 in time\. Start `edg"
            ):
                await trainer.run_request(request)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(inside())
