"""Sites: what several processes gain, what our launcher and checks cost beside plain torchrun, and DiLoCo's loss and
bytes beside synchronous data-parallel training.

`ddp`: epochs of a CNN in one process on one core, in one on all cores, in two, and in two of plain torchrun with
DistributedDataParallel, in turn. A process of torchrun has one core (OMP_NUM_THREADS=1), so what a second process gains
is measured against one of these, as Horovod's scaling efficiency is (Sergeev and Del Balso 2018).
`diloco`: `examples/diloco` at four sites, H = 50, against one global batch of all sites in every step, on the same
samples in the same order. Both begin from the same model, which was trained in step for a while, as the paper's is; the
server's rates are the paper's, and AdamW's averages are kept. A site's processes do not change its update (a test holds
it to 1e-9), so a site is simulated by one. Bytes of the rival: a ring all-reduce over the 8 processes sends and
receives 2 * 7/8 of the gradients per step over each site's link, which is the least (Patarasuk & Yuan 2009).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from benchmarks import sites_cnn as cnn
from benchmarks.report import Row, Target, command, installed
from edge_agent.training import trainer_wire as wire
from edge_agent.training.trainer import Trainer
from edgefl.aggregation.schedules import of_round
from edgefl.config import JobConfig, TrainConfig, load_config
from edgefl.simulation.simulate import simulate
from edgefl.task import Task, load_task
from edgefl.training.evaluation import evaluate
from edgefl.training.local import batch_order, derive_seed, initial_parameters, make_model, tree_of
from edgefl.training.samples import train_samples
from edgefl.trees import Tree, write_tree

ROOT = Path(__file__).parents[1]
CNN = Path(__file__).parent / "sites_cnn.py"
EXAMPLE = ROOT / "examples" / "diloco"
SITES, PROCESSES = 4, 2
EPOCHS, BATCH = 2, 256  # of all processes together
FLOAT_BYTES = 4
_THREADS = "OMP_NUM_THREADS"
VARIANTS = {  # of what is exchanged
    "": (),
    ", updates in int8 and the model in bf16": ("train.wire=int8", "server.wire=bf16"),
    ", 3 fragments in turn": ("server.fragments=3",),
}
PAPER = ("train.keep_optimizer_state=true", "server.lr=0.7", "server.options.momentum=0.9")


def measure(*, quick: bool) -> Iterator[Row]:
    yield from ddp(repeats=1 if quick else 5)
    yield from diloco(rounds=2 if quick else 20)


@dataclass(frozen=True, slots=True)
class Took:
    """What a round of local training took."""

    seconds: float
    cpu_s: float  # of all its processes


def ddp(repeats: int) -> Iterator[Row]:
    """Measure a round's training, without the start of the processes, which stay for all rounds."""
    took: dict[str, list[Took]] = {"one core": [], "all cores": [], "two": [], "torchrun": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(repeats):
            with _threads(1):
                took["one core"].append(asyncio.run(_round(folder, processes=1)))
            took["all cores"].append(asyncio.run(_round(folder, processes=1)))
            took["two"].append(asyncio.run(_round(folder, processes=2)))
            took["torchrun"].append(_torchrun(folder))
    seconds = {name: statistics.median(one.seconds for one in several) for name, several in took.items()}
    cpu_s = {name: statistics.median(one.cpu_s for one in several) for name, several in took.items()}
    detail = {name: [[round(one.seconds, 2), round(one.cpu_s, 2)] for one in several] for name, several in took.items()}
    what, plain = "CNN, 2 processes on this machine", f"torchrun and DDP, torch {installed('torch')}"
    for cores, targets in (("one core", (Target(of="ratio", at_least=1.5),)), ("all cores", ())):
        yield Row(
            workload=what, metric="round of local training", unit="s", ours=seconds["two"],
            rival=f"1 process on {cores}", theirs=seconds[cores], targets=targets, detail=detail,
        )  # fmt: skip
    for metric, of in (("round of local training", seconds), ("processor time of a round", cpu_s)):
        yield Row(
            workload=what, metric=metric, unit="s", ours=of["two"], rival=plain, theirs=of["torchrun"],
            targets=(Target(of="ratio", at_least=1 / 1.05),), detail=detail,
        )  # fmt: skip


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """Let processes that start within the block compute with so many threads."""
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = str(number)
    try:
        yield
    finally:
        del os.environ[_THREADS]
        if before is not None:
            os.environ[_THREADS] = before


async def _round(folder: Path, processes: int) -> Took:
    """Return what a round takes, after one that starts the processes."""
    with zipfile.ZipFile(folder / "bundle.zip", "w") as archive:
        archive.write(CNN, "sites_cnn.py")
    with (folder / "model").open("wb") as file:
        write_tree(initial_parameters(cnn.task), file)
    trainer = Trainer()
    running = asyncio.create_task(trainer.run())
    train = TrainConfig(processes=processes, epochs=EPOCHS, batch_size=BATCH, lr=0.05)
    try:
        for number in (1, 2):
            start_s, start_cpu_s = time.perf_counter(), _cpu_s(trainer)
            request = wire.FitRequest(
                job="job", round=number, client="site", train=train, model=str(folder / "model"),
                bundle=str(folder / "bundle.zip"), task="sites_cnn:task", options={}, out=str(folder / "out"),
                memory_limit_mb=0,
            )  # fmt: skip
            await trainer.run_request(request)
        return Took(time.perf_counter() - start_s, _cpu_s(trainer) - start_cpu_s)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def _cpu_s(trainer: Trainer) -> float:
    """Return the processor time of a trainer and all its processes so far."""
    if trainer.pid is None:
        return 0.0
    process = psutil.Process(trainer.pid)
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def _torchrun(folder: Path) -> Took:
    """Return what the same epochs take by plain torchrun, without its start."""
    out = folder / "plain.json"
    subprocess.run(
        ["nice", "-n", "10", sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(CNN), str(EPOCHS), str(BATCH), str(out)], check=True, cwd=ROOT, capture_output=True,
    )  # fmt: skip
    return Took(**json.loads(out.read_text()))


def diloco(rounds: int, steps: int = 50) -> Iterator[Row]:
    """Train `examples/diloco` by rounds of so many steps, with each of the variants, and in step."""
    task, settings = load_task(str(EXAMPLE)), [f"rounds.count={rounds}", f"train.steps={steps}", *PAPER]
    before = load_config(JobConfig, EXAMPLE / "config.toml", [*settings, "train.schedule=constant", "train.seed=1"])
    task = _beginning_with(task, _synchronous(task, before))
    config = load_config(JobConfig, EXAMPLE / "config.toml", settings)
    theirs, total = _synchronous(task, config), rounds * steps
    size = sum(int(np.prod(one.shape)) for one in theirs.values())
    ring, loss = ring_bytes(processes=SITES * PROCESSES, steps=total, parameters=size), evaluate(task, theirs)["loss"]
    rival = "synchronous data-parallel, same samples"
    for variant, more in VARIANTS.items():
        chosen = load_config(JobConfig, EXAMPLE / "config.toml", [*settings, *more])
        result = simulate(task, clients=SITES, config=chosen, engine="loop")
        moved = sum(one.up_bytes + one.down_bytes for one in result.rounds) / SITES
        what = f"small GPT, {SITES} sites x {PROCESSES} processes, H={steps}, {total} steps{variant}"
        detail = {"parameters": size, "ours_bytes": moved, "theirs_bytes": ring}
        yield Row(
            workload=what, metric="held-out loss", unit="nats", ours=result.final["loss"], rival=rival, theirs=loss,
            targets=(Target(of="ratio", at_least=1 / 1.01),), detail=detail,
        )  # fmt: skip
        yield Row(
            workload=what, metric="over a site's link, both ways", unit="MB", ours=moved / 1e6, rival=rival,
            theirs=ring / 1e6, targets=(Target(of="ratio", at_least=200),), detail=detail,
        )  # fmt: skip


def ring_bytes(*, processes: int, steps: int, parameters: int) -> float:
    """Return what a process sends and receives in rings of all-reduce over float32 gradients."""
    return steps * 2 * 2 * (processes - 1) / processes * parameters * FLOAT_BYTES


def _beginning_with(task: Task, tree: Tree) -> Task:
    """Return a task whose model begins with these parameters."""
    import torch

    def model() -> torch.nn.Module:
        made: torch.nn.Module = task.model()  # type: ignore[misc]  # it has one
        made.load_state_dict({name: torch.tensor(np.asarray(one)) for name, one in tree.items()})
        return made

    return dataclasses.replace(task, model=model)


def _synchronous(task: Task, config: JobConfig) -> Tree:
    """Return the parameters after as many steps on the batches of all sites together."""
    import torch

    model = make_model(task, initial_parameters(task, config.train.seed))
    model.train()
    sites = [train_samples(task, {"part": str(n), "parts": str(SITES)}) for n in range(SITES)]
    optimizer = task.optimizer_of(list(model.parameters()), config.train)
    for number in range(1, config.rounds.count + 1):
        train = of_round(config, number)
        for group in optimizer.param_groups:
            group["lr"] = train.lr
        orders = [
            batch_order(model, one, train, derive_seed(train.seed, number, f"client-{n}"))
            for n, one in enumerate(sites)
        ]
        for positions in zip(*orders, strict=True):
            batches = [one.chosen(which) for one, which in zip(sites, positions, strict=True)]
            inputs = torch.cat([one.inputs for one in batches])
            optimizer.zero_grad()
            task.loss(model(inputs), torch.cat([one.targets for one in batches])).backward()
            optimizer.step()
    return tree_of(task, model)


main = command(measure, __doc__ or "")

if __name__ == "__main__":
    main()
