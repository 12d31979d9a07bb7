"""Training in parts: equal to unsplit training, bytes of a frozen device part, memory of a device.

The device's loop and the cloud's session are those of a fleet, with a socket between two processes; no network.

    python -m benchmarks.split_training [--quick] [--json F]
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.report import Row, Target, command
from benchmarks.split_workloads import WORKLOADS, SplitWorkload
from cloud.split.cache import CacheQuota
from cloud.split.records import SessionSpec
from cloud.split.results import SplitFolder
from cloud.split.sessions import CloudJob
from edgefl.config import TrainConfig
from edgefl.offload.training.model import PartedModel, SplitTrees
from edgefl.protocols.split.messages import BeginTraining, FrameReader, parse_frame
from edgefl.settings.split import SplitConfig
from edgefl.training.adapters import adapters_of, restart
from edgefl.training.evaluation import Judge
from edgefl.training.local import (
    adapter_seed,
    delta_of,
    derive_seed,
    initial_parameters,
    make_model,
    train_epochs,
)
from edgefl.training.samples import train_samples
from edgefl.training.steps.descent import Autograd, Descent
from edgefl.trees import SpooledTree, Tree, tree_bytes, write_tree
from edgefl.trees.factors import is_low_rank
from edgefl.trees.views import joined, renamed

STEPS = 20
EQUAL = 1e-5
DEVICE = "bench"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedInParts:
    """What came out of a training in parts."""

    before: Tree  # the whole model's tensors
    change: Tree  # of those that were trained
    cut_bytes: int  # over the cut, both ways
    device_peak_mb: float
    device_bytes: int  # of the device's tensors


def measure(*, quick: bool) -> Iterator[Row]:
    """Run everything, and yield the rows as they are done."""
    for name in ("cnn", "vit", "decoder", *(() if quick else ("smollm2",))):
        yield _equality(WORKLOADS[name], quick=quick)
    yield from _frozen(WORKLOADS["digits"], quick=quick)
    for name in ("large-quick",) if quick else ("large", "smollm2-u"):
        yield _memory(WORKLOADS[name], quick=quick)


def _equality(work: SplitWorkload, *, quick: bool) -> Row:
    """20 steps with one seed, in parts and of the whole model."""
    steps = 3 if quick else STEPS
    config = _config(work, {"micro_batches": 2}, steps=steps)
    with tempfile.TemporaryDirectory(prefix="edgefl-split-") as folder:
        parts = train_in_parts(work, config, Path(folder))
    task = work.task()
    model = make_model(task, parts.before, seed=config.seed).train()
    restart(model, adapters_of(task.name, model), adapter_seed(config.seed, 1))
    descent = Descent(task, Autograd(task, model))
    train_epochs(task, model, train_samples(task, {}), config, derive_seed(config.seed, 1, DEVICE), descent)
    wanted = delta_of(task, model, {name: parts.before[name] for name in parts.change})
    off = max(float(np.abs(parts.change[name] - wanted[name]).max()) for name in wanted)
    moved = max(float(np.abs(wanted[name]).max()) for name in wanted)
    return Row(
        workload=f"{work.name}, {steps} steps, fp32", metric="largest difference from unsplit training", unit="",
        ours=off, targets=(Target(of="ours", at_most=EQUAL),), detail={"largest step": moved, "cut": work.cut},
    )  # fmt: skip


def _frozen(work: SplitWorkload, *, quick: bool) -> Iterator[Row]:
    """Five epochs: the activations once in int8, against fp32 both ways in each epoch."""
    epochs, accuracy, cut_bytes = (2 if quick else 5), dict[str, float](), dict[str, int]()
    shapes: Mapping[str, Mapping[str, str]] = {
        "each": {"device_part": "trained"},
        "once": {"device_part": "frozen", "wire": "int8"},
        "exact": {"device_part": "frozen"},
    }
    for name, shape in shapes.items():
        with tempfile.TemporaryDirectory(prefix="edgefl-split-") as folder:
            found = train_in_parts(work, _config(work, shape, epochs=epochs), Path(folder))
        cut_bytes[name], accuracy[name] = found.cut_bytes, Judge(work.task())(_trained(found))["accuracy"]
    yield Row(
        workload=f"{work.name}, {epochs} epochs", metric="bytes over the cut: frozen in int8, sent once", unit="MB",
        ours=cut_bytes["once"] / 1e6, rival="fp32 both ways in each epoch", theirs=cut_bytes["each"] / 1e6,
        targets=() if quick else (Target(of="ratio", at_least=20.0),),
    )  # fmt: skip
    yield Row(
        workload=f"{work.name}, {epochs} epochs", metric="points lost by int8, sent once", unit="points",
        ours=100 * (accuracy["exact"] - accuracy["once"]), targets=(Target(of="ours", at_most=0.5),),
        detail={f"accuracy, {name}": one for name, one in accuracy.items()},
    )  # fmt: skip


def _memory(work: SplitWorkload, *, quick: bool) -> Row:
    """The peak of a device whose model is many times its memory."""
    config = _config(work, {}, steps=1 if quick else 3)
    with tempfile.TemporaryDirectory(prefix="edgefl-split-") as folder:
        found = train_in_parts(work, config, Path(folder), limit_mb=work.limit_mb)
    whole = tree_bytes(found.before)
    return Row(
        workload=f"{work.name}: {whole / 1e6:.0f} MB of weights, {work.limit_mb} MB of data allowed on the device",
        metric="peak of the device", unit="MB", ours=found.device_peak_mb,
        detail={"device's tensors, MB": found.device_bytes / 1e6, "weights / limit": whole / 1e6 / work.limit_mb},
    )  # fmt: skip


def _config(work: SplitWorkload, split: Mapping[str, object], **train: int) -> TrainConfig:
    chosen = SplitConfig(**{"cut": work.cut, "last_cut": work.last_cut, "server": "127.0.0.1:1", **split})  # type: ignore[arg-type]
    return TrainConfig(mode="split", split=chosen, batch_size=work.batch_size, lr=work.lr, round=1, **train)  # type: ignore[arg-type]


def train_in_parts(work: SplitWorkload, config: TrainConfig, folder: Path, limit_mb: int = 0) -> TrainedInParts:
    """Train with a device in a process of its own; return the whole model after it."""
    task = work.task()
    tensors = work.tensors(folder) if work.tensors is not None else initial_parameters(task, config.seed)
    model = PartedModel(task=task, config=config)
    layout = work.layout(config)
    parts = model.parts(layout)
    trees = model.divided(parts, tensors)
    _write(trees, folder)
    job = CloudJob(model=model, folder=SplitFolder(folder / "home", "job"), quota=CacheQuota(1 << 30, 1 << 30))
    ours, theirs = socket.socketpair()
    settings = {"work": work.key, "folder": str(folder), "limit_mb": limit_mb, "config": dataclasses.asdict(config)}
    with theirs:
        device = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.split_device", str(theirs.fileno()), json.dumps(settings)],
            pass_fds=(theirs.fileno(),), stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # each thread has a buffer, and it waits for ever for one
        )  # fmt: skip
    with ours:
        num_bytes = _serve(ours, job, config, folder)
    said, _ = device.communicate(timeout=600)
    if device.returncode:
        raise RuntimeError(f"the device ended with exit status {device.returncode}")
    report = json.loads(said.splitlines()[-1])
    result = job.folder.result(1, DEVICE)
    if result is None:
        raise RuntimeError("the cloud's part has not finished")
    places = model.trained_in_cloud(parts, tensors)
    in_cloud = {name: np.asarray(one if is_low_rank(name) else one - tensors[name]) for name, one in result[0].items()}
    change = joined(model.update(SpooledTree(folder / "moved"), trees.moving), renamed(in_cloud, places))
    return TrainedInParts(
        before=tensors, change=change, cut_bytes=num_bytes, device_peak_mb=report["peak_mb"],
        device_bytes=tree_bytes(trees.moving) + tree_bytes(trees.on_device),
    )  # fmt: skip


def _trained(found: TrainedInParts) -> Tree:
    return {name: one + found.change[name] if name in found.change else one for name, one in found.before.items()}


def _write(trees: SplitTrees, folder: Path) -> None:
    for name, tree in (("moving", trees.moving), ("frozen", trees.on_device), ("cloud", trees.in_cloud)):
        with (folder / name).open("wb") as file:
            write_tree(tree, file)


def _serve(control: socket.socket, job: CloudJob, config: TrainConfig, folder: Path) -> int:
    """Answer a device's frames until it is gone; return the bytes both ways."""
    reader, total, session = FrameReader(), 0, None
    while data := control.recv(1 << 20):
        total += len(data)
        for body in reader.feed(data):
            frame = parse_frame(body)
            if isinstance(frame.message, BeginTraining):
                begin = frame.message
                session = job.session(
                    SessionSpec(
                        device=DEVICE, round=1, tensors=str(folder / "cloud"), train=config, inputs=begin.inputs,
                        samples=begin.samples, steps=begin.steps,
                    )
                )  # fmt: skip
            if session is None:
                raise RuntimeError("the device did not begin")
            answer = session.handle(frame)
            control.sendall(answer)
            total += len(answer)
    return total


if __name__ == "__main__":
    command(measure, __doc__)()
