"""What trains on a simulated device: a tiny update that follows from device, round and parameters, and is written down.

It stands at the border of the trainer process: the agent hands it a request and gets a file, as from a real one. What
was trained goes into the log from which the auditor computes what the model must be.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from edge_agent.training import trainer_wire as wire
from edgefl.faults.machine.threads import kernel
from edgefl.trees import SpooledTree, write_tree

STEP = 0.3  # how far an update goes from the parameters towards the device's own
LONGEST_S = 3.0


class SimTrainer:
    """`edge_agent.training.trainer.Trainer`, as far as a participant uses it."""

    pid = None

    def __init__(self, log: Callable[[dict[str, Any]], None], *, tells_base: bool = False) -> None:
        """`tells_base`: write down the parameters, too: those of a region are in no file of the cloud."""
        self._log, self._tells_base = log, tells_base

    async def run(self) -> None:
        await asyncio.get_running_loop().create_future()

    async def prepare(self, _task: str = "") -> None:
        await asyncio.sleep(0.05)

    def keep_spare(self) -> None:
        """There is no process."""

    async def run_request(self, request: wire.FitRequest, _evaluate_until: float | None = None) -> wire.WorkDone:
        """Train, which takes some time; raises nothing."""
        asked = {"device": request.client, "job": request.job, "round": request.round}
        base, parameters = _read(Path(request.model))
        told = {"base_values": _lists(parameters)} if self._tells_base else {}
        self._log({"kind": "started", **asked, "base": base, **told})
        await asyncio.sleep(kernel().order.random() ** 2 * LONGEST_S)
        update, weight = trained(request.client, request.round, parameters, request.train.algorithm)
        data = _written(update, Path(request.out))
        self._log({"kind": "trained", **asked, "base": base, "weight": weight, "update": _lists(update)})
        return wire.WorkDone(size=len(data), blake3=blake3(data).hexdigest(), weight=weight, metrics={"loss": weight})


def _lists(tree: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: value.astype(np.float64).tolist() for name, value in tree.items()}


def _read(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """Return the hash and the tensors of a model's file."""
    return hashlib.sha256(path.read_bytes()).hexdigest(), {
        name: np.array(value) for name, value in SpooledTree(path).items()
    }


def _written(update: dict[str, np.ndarray], path: Path) -> bytes:
    """Write an update to disk, and return its bytes."""
    with path.open("wb") as file:
        write_tree(update, file)
        file.flush()
        os.fsync(file.fileno())
    return path.read_bytes()


def trained(
    device: str, number: int, parameters: dict[str, np.ndarray], algorithm: str
) -> tuple[dict[str, np.ndarray], float]:
    """Return a device's update and its weight: a delta, or for FedSGD a gradient, which has the other sign."""
    draw = np.random.default_rng([zlib.crc32(device.encode()), number])
    weight = float(draw.integers(1, 50))
    sign = -1.0 if algorithm == "fedsgd" else 1.0
    update = {}
    for name, value in sorted(parameters.items()):
        own = draw.standard_normal(value.shape)
        update[name] = (sign * STEP * (own - value.astype(np.float64))).astype(value.dtype)
    return update, weight
