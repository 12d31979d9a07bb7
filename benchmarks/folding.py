"""The fold of updates in files, as the cloud folds them, beside a bare numpy weighted add over the same files.

    python -m benchmarks.folding MODEL WEIGHT FILE [WEIGHT FILE ...] [--block ELEMENTS] [--region]

is one round: guard, mean, step, checks and hash of the new model, in a process of its own, so that its peak of resident
memory is that of the fold. It prints seconds, peak and SHA-256 as JSON. With --region, a region folds the updates
first, and the round has its one partial sum.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.memory import peak_rss_mb
from benchmarks.workload import RunFailedError
from cloud.region.sums import Folding, partial_of
from edgefl import trees
from edgefl.aggregation.server_opt import ServerOptimizer
from edgefl.config import JobConfig, from_dict
from edgefl.hashing import HashingFile
from edgefl.records import Answer, Plan, Traffic, Update
from edgefl.rounds import Job, run_rounds
from edgefl.settings.server import ServerConfig
from edgefl.trees import SpooledTree, TensorSpec, Tree, blocks, write_tree

Weighted = Sequence[tuple[float, Path]]
PIECE = 1 << 20  # elements of the pattern that files repeat
CHILD_S = 1800.0


class _Files:
    """A fleet whose updates are in files already."""

    def __init__(self, updates: Weighted) -> None:
        self._updates = {f"device-{index}": one for index, one in enumerate(updates)}

    def clients(self) -> Sequence[str]:
        return list(self._updates)

    def updates(self, plan: Plan) -> Iterator[Update]:
        for device, (weight, path) in self._updates.items():
            yield Update(job=plan.job, round=plan.round, device=device, tree=SpooledTree(path), weight=weight)

    def collect(self, plan: Plan) -> Iterator[Answer]:
        yield from self.updates(plan)

    def traffic(self) -> Traffic:
        return Traffic()


class _RegionFiles(_Files):
    """The same below a region, which sends its sum: a file in `folder`."""

    def __init__(self, updates: Weighted, folder: Path) -> None:
        super().__init__(updates)
        self._sum = folder / "sum"

    def collect(self, plan: Plan) -> Iterator[Answer]:
        folding = Folding(plan)
        for update in self.updates(plan):
            folding.add(update)
        with self._sum.open("wb") as file:
            write_tree(folding.mean(), file)
        yield partial_of(folding.note(), SpooledTree(self._sum))


class _Nowhere:
    def write(self, data: memoryview, /) -> int:
        return len(data)


def write_model(path: Path, num_bytes: int, tensors: int = 4, seed: int = 0) -> None:
    """Write a tree of this many bytes of float32, in some tensors of equal size."""
    size = num_bytes // (4 * tensors)
    pattern = np.random.default_rng(seed).normal(size=PIECE).astype(np.float32)
    spec = {f"w{index}": TensorSpec((size,), np.dtype(np.float32)) for index in range(tensors)}

    def read(_name: str, block: slice) -> trees.Array:
        first, last, _ = block.indices(size)
        return pattern.take(np.arange(first, last), mode="wrap")

    with path.open("wb") as file:
        write_tree(trees.ComputedTree(spec, read), file)


def fold(model: Path, updates: Weighted, *, region: bool = False) -> tuple[float, str]:
    """Fold the updates in one round; return its seconds and the SHA-256 of the new model's file."""
    hashing = HashingFile(_Nowhere(), hashlib.sha256())

    def keep(new: Tree) -> Tree:
        write_tree(new, hashing)
        return {}

    settings = from_dict(JobConfig, {"rounds": {"count": 1, "quorum": len(updates), "evaluate_every": 0}})
    step = ServerOptimizer(ServerConfig(lr=0.5), gradient=False)
    start_s = time.perf_counter()
    job = Job(id="job", config=settings, step=step, keep=keep)
    with tempfile.TemporaryDirectory(prefix="edgefl-") as folder:
        next(run_rounds(job, _RegionFiles(updates, Path(folder)) if region else _Files(updates), SpooledTree(model)))
    return time.perf_counter() - start_s, hashing.hexdigest()


def bare_add(updates: Weighted) -> float:
    """Add the same files with numpy alone, in blocks and in float64, without any check; return the seconds."""
    start_s = time.perf_counter()
    spec = SpooledTree(updates[0][1]).spec
    totals = {name: np.zeros(one.size) for name, one in spec.items()}
    for weight, path in updates:
        tree, factor = SpooledTree(path), np.float64(weight)
        for name, total in totals.items():
            delta = tree[name]
            for block in blocks(total.size):
                total[block] += factor * delta[block]
    return time.perf_counter() - start_s


def plain_add(updates: Weighted) -> float:
    """Add the same files as one would write it down: `total += weight * update`, in float32."""
    start_s = time.perf_counter()
    spec = SpooledTree(updates[0][1]).spec
    totals = {name: np.zeros(one.size, np.float32) for name, one in spec.items()}
    for weight, path in updates:
        tree = SpooledTree(path)
        for name in totals:
            totals[name] += np.float32(weight) * tree[name]
    return time.perf_counter() - start_s


def fold_alone(model: Path, updates: Weighted, block: int | None = None, *, region: bool = False) -> dict[str, Any]:
    """Fold in a process of its own; return its seconds, peak_mb and sha256. Raises RunFailedError."""
    words = [word for weight, path in updates for word in (str(weight), str(path))]
    options = [] if block is None else ["--block", str(block)]
    options += ["--region"] if region else []
    command = [sys.executable, "-m", "benchmarks.folding", str(model), *words, *options]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_S, check=False)
    if ran.returncode:
        raise RunFailedError(f"the fold failed: {ran.stderr[-500:]}")
    said: dict[str, Any] = json.loads(ran.stdout)
    return said


@click.command(help=__doc__)
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("words", nargs=-1)
@click.option("--block", type=int)
@click.option("--region", is_flag=True)
def main(*, model: Path, words: tuple[str, ...], block: int | None, region: bool) -> None:
    trees.BLOCK_ELEMENTS = block or trees.BLOCK_ELEMENTS
    updates = [(float(weight), Path(path)) for weight, path in zip(words[::2], words[1::2], strict=True)]
    seconds, sha256 = fold(model, updates, region=region)
    peak_mb = peak_rss_mb(os.getpid())  # not rusage, which would start from the parent's
    click.echo(json.dumps({"seconds": seconds, "peak_mb": peak_mb, "sha256": sha256}))


if __name__ == "__main__":
    main()
