"""The trainer as a process: fed, cancelled, killed, and there again for the next fit."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edge_agent.training import trainer_wire as wire
from edge_agent.training.trainer import Trainer
from edgefl.config import TrainConfig
from edgefl.errors import TaskError, TrainerLost
from edgefl.trees import read_tree, write_tree

TASK = """
    import ctypes, os, sys, time
    import numpy as np
    from edgefl import FitResult, Task

    def fit(parameters, config, options):
        what = options.get("what", "")
        ones = {name: np.ones_like(value) for name, value in parameters.items()}
        if what == "print":
            print("said by the task")
        if what == "raise":
            raise ValueError("the task's own words")
        if what == "nothing":
            return None
        if what == "shape":
            return FitResult(tree={"w": np.ones(1, np.float32)}, weight=1.0)
        if what == "nan":
            return FitResult(tree={"w": np.full(4, np.nan, np.float32)}, weight=1.0)
        if what == "weight":
            return FitResult(tree=ones, weight=-1)
        if what == "exit":
            os._exit(3)
        if what == "segfault":
            ctypes.string_at(0)
        if what == "eat":
            eaten = np.ones(200_000_000)
        if what == "hang":
            open(options["log"], "w").close()
            while True:
                time.sleep(0.01)
        if what == "stubborn":
            while True:
                try:
                    open(options["log"], "w").close()
                    time.sleep(60)
                except BaseException:
                    pass
        if what == "fork":
            if os.fork() == 0:
                time.sleep(60)
                os._exit(0)
            os._exit(4)
        if what == "pid":
            return FitResult(tree=ones, weight=float(os.getpid()), metrics={"nice": os.getpriority(os.PRIO_PROCESS, 0)})
        return FitResult(tree=ones, weight=2.0)

    task = Task(name="bad", initial=dict, fit=fit)
"""


class Bench:
    """A trainer with what a fit needs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bundle = folder / "bundle.zip"
        with zipfile.ZipFile(self.bundle, "w") as archive:
            archive.writestr("user_task.py", textwrap.dedent(TASK))
        with (folder / "model").open("wb") as file:
            write_tree({"w": np.zeros(4, np.float32)}, file)

    def fit(self, what: str = "", memory_limit_mb: int = 0) -> wire.FitRequest:
        return wire.FitRequest(
            job="j", round=1, client="cam-1", train=TrainConfig(), model=str(self.folder / "model"),
            bundle=str(self.bundle), task="user_task:task",
            options={"what": what, "log": str(self.folder / "log")}, out=str(self.folder / "out"),
            memory_limit_mb=memory_limit_mb,
        )  # fmt: skip

    def run(self, function, **options):
        async def inside():
            trainer = Trainer(**options)
            running = asyncio.create_task(trainer.run())
            try:
                async with asyncio.timeout(60):
                    return await function(trainer)
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
                assert trainer.pid is None

        return asyncio.run(inside())


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def test_one_child_trains_plan_after_plan(bench):
    async def run(trainer):
        return [await trainer.run_request(bench.fit("pid")) for _ in range(3)]

    first, *others = bench.run(run)
    assert {done.weight for done in others} == {first.weight}
    assert first.weight != os.getpid()
    assert first.metrics["train_nice"] >= 10
    assert read_tree((bench.folder / "out").read_bytes())["w"].tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("raise", "task 'bad': fit raised ValueError: the task's own words .*user_task.py:"),
        ("nothing", "task 'bad': fit returned a NoneType, not an edgefl.FitResult"),
        ("shape", r"tensor 'w' is float32\[1\], not float32\[4\]"),
        ("nan", "tensor 'w' holds NaN or infinity"),
        ("weight", "weight -1.0 must be finite"),
        ("exit", "the trainer ended with exit status 3 while it trained"),
        ("segfault", "the trainer was killed by SIGSEGV while it trained"),
        ("fork", "the trainer ended with exit status 4 while it trained"),
    ],
)
def test_a_bad_task_fails_with_its_reason_and_the_next_fit_works(bench, what, said):
    async def run(trainer):
        with pytest.raises(TaskError, match=said):
            await trainer.run_request(bench.fit(what))
        return await trainer.run_request(bench.fit())

    assert bench.run(run).weight == 2.0


def test_an_eater_hits_its_limit_and_a_fresh_child_follows(bench):
    async def run(trainer):
        before = (await trainer.run_request(bench.fit("pid"))).weight
        with pytest.raises(TaskError, match="the task exceeded its memory limit of 700 MB"):
            await trainer.run_request(bench.fit("eat", memory_limit_mb=700))
        assert (await trainer.run_request(bench.fit("pid", memory_limit_mb=700))).weight != before

    bench.run(run)


async def cancelled(trainer, bench, what, until):
    task = asyncio.create_task(trainer.run_request(bench.fit(what)))
    await until((bench.folder / "log").exists)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()


def test_a_cancelled_fit_leaves_its_child_ready(bench, until):
    async def run(trainer):
        before = (await trainer.run_request(bench.fit("pid"))).weight
        await cancelled(trainer, bench, "hang", until)
        assert (await trainer.run_request(bench.fit("pid"))).weight == before

    bench.run(run)


def test_a_task_that_does_not_let_go_is_killed(bench, alive, until):
    async def run(trainer):
        before = int((await trainer.run_request(bench.fit("pid"))).weight)
        await cancelled(trainer, bench, "stubborn", until)
        assert not alive(before)
        assert (await trainer.run_request(bench.fit("pid"))).weight != before

    bench.run(run)


def test_a_child_killed_from_outside_is_replaced(bench):
    async def run(trainer):
        await trainer.prepare()
        os.kill(trainer.pid, signal.SIGKILL)
        await asyncio.sleep(0.05)
        return await trainer.run_request(bench.fit())

    assert bench.run(run).weight == 2.0


def test_an_idle_child_is_ended(bench, until):
    async def run(trainer):
        await trainer.run_request(bench.fit())
        assert trainer.pid
        await until(lambda: trainer.pid is None)
        return await trainer.run_request(bench.fit())

    assert bench.run(run, idle_s=0.1).weight == 2.0


def test_what_a_task_prints_goes_to_stderr(bench, capfd):
    async def run(trainer):
        return await trainer.run_request(bench.fit("print"))

    assert bench.run(run).weight == 2.0
    captured = capfd.readouterr()
    assert "said by the task" in captured.err
    assert captured.out == ""


def test_a_child_whose_agent_is_killed_ends_even_if_its_task_hangs(bench, eventually, alive, children_of):
    script = f"""
import asyncio, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from edge_agent.training.trainer import Trainer
from edge_agent.training import trainer_wire as wire
fit = wire.parse({wire.frame(bench.fit("stubborn"))[wire.HEAD_BYTES :]!r})
asyncio.run(Trainer().run_request(fit))
"""
    agent = subprocess.Popen([sys.executable, "-c", script])
    eventually((bench.folder / "log").exists, "the fit")
    [trainer] = children_of(agent.pid)
    agent.kill()
    agent.wait()
    eventually(lambda: not alive(trainer), "the trainer's end")


def test_a_socket_that_does_not_answer_is_named(bench, tmp_path):
    async def run(trainer):
        with pytest.raises(TrainerLost, match=r"Check `systemctl status edgefl-trainer"):
            await trainer.run_request(bench.fit())

    bench.run(run, socket_path=tmp_path / "none.sock")


@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="systemd-socket-activate is not there")
def test_a_trainer_of_systemds(bench, tmp_path, eventually, alive):
    path = tmp_path / "trainer.sock"
    command = [
        "systemd-socket-activate",
        "-l",
        str(path),
        sys.executable,
        "-m",
        "edge_agent.training.trainer_main",
        "--listen-fds",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(command, env=environment) as service:
        eventually(path.exists, "the socket")

        async def run(trainer):
            done = await trainer.run_request(bench.fit("pid"))
            assert done.weight == trainer.pid
            with pytest.raises(TrainerLost, match="the trainer died while it trained"):
                await trainer.run_request(bench.fit("exit"))

        try:
            bench.run(run, socket_path=path)
        finally:
            service.kill()


def test_a_fit_that_is_cancelled_twice_leaves_a_trainer_that_works(bench, until):
    """A round is closed and the next plan comes at once, while the child does not let go."""

    async def run(trainer):
        task = asyncio.create_task(trainer.run_request(bench.fit("stubborn")))
        await until((bench.folder / "log").exists)
        task.cancel()
        await until(lambda: trainer._abandoning is not None)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        assert (await trainer.run_request(bench.fit("pid"))).weight > 0

    bench.run(run)


def test_the_child_is_kept_for_the_next_job_of_the_same_task_and_no_other(bench, until):
    async def run(trainer):
        async def pid_for(task):
            await trainer.prepare(task)
            return (await trainer.run_request(bench.fit("pid"))).weight

        first = await pid_for("a")
        assert await pid_for("b") == first  # two jobs that run at the same time share it
        assert await pid_for("a") == first
        trainer.keep_spare()
        assert await pid_for("a") == first
        trainer.keep_spare()
        assert await pid_for("b") != first
        trainer.keep_spare()
        await until(lambda: trainer.pid is None)  # idle for long enough
        assert await pid_for("b")

    bench.run(run, idle_s=1.0)
