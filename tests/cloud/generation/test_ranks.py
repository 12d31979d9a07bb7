"""A tail divided among processes of the real torchrun: tokens of the whole, whatever is killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys

import psutil
import pytest

from cloud.generation.joined_tail import JoinedTail
from cloud.generation.ranks import RankedPart, grouped, spans
from cloud.generation.sessions import SessionLimits
from cloud.generation.tail import LanguageTail, TailLimits
from cloud.generation.tail_main import tried
from cloud.generation.tail_process import TailSpec
from cloud.stages.work import RequestRefused
from edgefl.errors import ConfigError, PartFailed
from edgefl.offload.generation.blocks import Rows, numpy_engine
from edgefl.offload.generation.generate import generate, load_part, weights_of
from edgefl.offload.generation.sampling import Sampling
from edgefl.offload.generation.stage_info import read_stage
from tests.cloud.generation.conftest import Device
from tests.language_models import SPEC, write_stages

WAIT_S = 120.0


@pytest.mark.parametrize(
    ("blocks", "ranks", "head", "expected"),
    [
        ((2, 10), 1, 3.0, [(2, 10)]),
        ((2, 10), 2, 0.0, [(2, 6), (6, 10)]),
        ((2, 10), 2, 2.0, [(2, 5), (5, 10)]),  # 3 blocks and the head, as large as 2, beside 5
        ((0, 24), 3, 6.0, [(0, 4), (4, 14), (14, 24)]),
        ((0, 4), 2, 90.0, [(0, 0), (0, 4)]),  # the head alone is more than the rest
        ((1, 3), 3, 0.0, [(1, 1), (1, 2), (2, 3)]),
    ],
)
def test_blocks_are_divided_by_their_bytes(blocks, ranks, head, expected) -> None:
    assert spans(*blocks, ranks, head) == expected


def test_fewer_blocks_than_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match="a tail of 2 blocks cannot be divided among 4 processes; use at most 3"):
        spans(1, 3, 4, 0.0)


def test_sequences_of_a_step_are_grouped_by_their_rows() -> None:
    rows = [Rows(None, num) for num in (1, 1, 1, 1)]
    assert [[one.num for one in group] for group in grouped(rows, 2)] == [[1, 1], [1, 1]]
    assert [[one.num for one in group] for group in grouped([Rows(None, 64), *rows], 2)] == [[64], [1, 1, 1, 1]]
    assert [[one.num for one in group] for group in grouped(rows[:1], 3)] == [[1]]


class Torchrun:
    """torchrun with two processes of this machine, which connect to a socket."""

    def __init__(self, folder, socket, log, *, ranks=2, engine="numpy") -> None:
        self._log = log.open("w+")
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
            "--max-restarts", "9", "--monitor-interval", "0.1", "-m", "cloud.generation.ranks", "--folder", folder,
            "--join", socket, "--engine", engine, "--run-s", "30",
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        self.process = subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )

    def ranks(self):
        """Return the processes, the first one first."""
        found = {}
        for one in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it ends at this moment
                if "cloud.generation.ranks" in " ".join(one.cmdline()):
                    found[one.environ()["RANK"]] = one
        return [found[rank] for rank in sorted(found)]

    async def all_ranks(self):
        """Return both when both are there: one may be between two lives."""
        while len(found := self.ranks()) < 2:  # noqa: ASYNC110 - processes of another one
            await asyncio.sleep(0.05)
        return found

    def stop(self) -> str:
        left = self.ranks()
        self.process.kill()
        for one in left:  # of sessions of their own
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self.process.wait()
        self._log.seek(0)
        with self._log:
            return self._log.read()


@contextlib.asynccontextmanager
async def joined(folder, socket, **spec):
    spec = TailSpec(folder=folder / "tail", digest=read_stage(folder / "tail").digest, **spec)
    limits = SessionLimits(context=SPEC.context, token_bytes=SPEC.cache_bytes(2))
    processes = []

    def make(*given):
        processes.append(JoinedTail(socket, *given))
        return processes[-1]

    tail = LanguageTail(spec, TailLimits(max_sequences=8, prompt_rows=64), limits, make)
    async with tail.running():
        yield tail, processes[0]


async def tokens_of(device, prompt, num, sequence):
    """Return tokens; begin again with all rows when the tail says so, as a device does."""
    while True:
        try:
            return await device.tokens(prompt, num, sequence=sequence)
        except RequestRefused as refusal:
            if refusal.status not in {"UNAVAILABLE", "ABORTED"}:
                raise
            await asyncio.sleep(0.1)


@pytest.mark.timeout(300)
def test_two_ranks_compute_the_tokens_of_the_whole_also_when_one_is_killed(tmp_path) -> None:
    write_stages(tmp_path, 1)
    write_stages(tmp_path, None)
    socket, log = tmp_path / "tail.sock", tmp_path / "torchrun.log"
    whole = load_part(tmp_path / "whole", numpy_engine())
    prompts = {f"cam-{number}": [*range(5 + number, 9 + 2 * number)] for number in range(4)}
    expected = {name: [*generate([whole], prompt, 12, Sampling())] for name, prompt in prompts.items()}

    async def run():
        head = load_part(tmp_path / "head", numpy_engine())
        async with asyncio.timeout(WAIT_S), joined(tmp_path, socket) as (tail, process):
            devices = {name: Device(tail, head, name) for name in prompts}

            async def all_tokens(sequence):
                made = [tokens_of(devices[name], prompt, 12, sequence) for name, prompt in prompts.items()]
                return dict(zip(prompts, await asyncio.gather(*made), strict=True))

            assert await all_tokens("a") == expected
            for rank in (1, 0):
                texts = asyncio.create_task(all_tokens(f"killed-{rank}"))
                await asyncio.sleep(0.05)
                os.kill((await torchrun.all_ranks())[rank].pid, signal.SIGKILL)
                assert await texts == expected
            assert process.pid == (await torchrun.all_ranks())[0].pid
        # the server starts again, the ranks stay
        first = (await torchrun.all_ranks())[0].pid
        async with asyncio.timeout(WAIT_S), joined(tmp_path, socket) as (tail, process):
            assert process.pid == first
            assert await tokens_of(Device(tail, head), prompts["cam-0"], 12, "b") == expected["cam-0"]

    torchrun = Torchrun(tmp_path / "tail", socket, log)
    try:
        asyncio.run(run())
    finally:
        said = torchrun.stop()
    assert "rank.up rank=1 of=2 blocks=2-4" in said, said  # the first has one block and the end
    assert not socket.exists()


class BrokenRing:
    """Two ranks, of which this is the first; nothing can be sent."""

    rank, ranks = 0, 2

    def tell(self, command) -> None:
        self.told = command

    def send(self, hidden) -> None:
        raise MemoryError("too little memory for what is sent")


def test_too_little_memory_in_the_middle_of_a_step_ends_the_process(tmp_path) -> None:
    """As an error of one sequence it would leave the other ranks waiting, with rows of another step."""
    write_stages(tmp_path, 1)
    folder = tmp_path / "tail"
    part = RankedPart(read_stage(folder), weights_of(folder), numpy_engine(), BrokenRing())
    with pytest.raises(PartFailed, match="a step through 2 processes failed: too little memory for what is sent"):
        tried(part)


@pytest.mark.timeout(300)
def test_three_ranks_on_torch(tmp_path) -> None:
    write_stages(tmp_path, 1)
    write_stages(tmp_path, None)
    socket, prompt = tmp_path / "tail.sock", [*range(9)]
    expected = [*generate([load_part(tmp_path / "whole", numpy_engine())], prompt, 12, Sampling())]

    async def run():
        async with asyncio.timeout(WAIT_S), joined(tmp_path, socket) as (tail, _):
            device = Device(tail, load_part(tmp_path / "head", numpy_engine()))
            assert await tokens_of(device, prompt, 12, "a") == expected

    torchrun = Torchrun(tmp_path / "tail", socket, tmp_path / "torchrun.log", ranks=3, engine="torch")
    try:
        asyncio.run(run())
    finally:
        said = torchrun.stop()
    assert "rank.up rank=1 of=3 blocks=1-2" in said, said


def test_nobody_who_leads_is_said(tmp_path) -> None:
    write_stages(tmp_path, 1)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "-m", "cloud.generation.ranks", "--folder",
        tmp_path / "tail", "--engine", "numpy",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=WAIT_S)
    assert done.returncode == 1
    assert "no process has --join; give it on the machine where" in done.stderr
