"""A device of `benchmarks.offload`: a placed model in a process of its own, in its network, slower than this machine.

    python -m benchmarks.offload_device FOLDER < wishes    one JSON object a line; one line of JSON for each

    {"placement": "auto", "requests": 50, "in_flight": 1}

FOLDER has the parts, `placed.json`, the inputs and the device's certificate. What a part computes takes as many times
longer as `SLOWER` says, by a pause after it: then the other processes have the processor, as a device's own would.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_agent.placement.keeper import PlacementKeeper
from edge_agent.placement.loading import load_placed, sample_inputs
from edge_agent.placement.placed_file import file_of, text_of
from edge_agent.placement.placed_model import PlacedModel
from edge_agent.serving.wire import LoadModel, TailAccess
from edge_agent.sessions import LoadedModel
from edgefl.trees import Tree

SLOWER = 8.0
SETTLE_LOOKS = 8  # of the plan, before anything is measured


class SlowDevice:
    """Runs one part after the other, as a device with one core does."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def compute(self, model: LoadedModel, names: Sequence[str], feeds: Mapping[str, Any]) -> list[Any]:
        """Run a part, and pause for the slower device."""
        async with self._lock:
            begun_s = time.thread_time()  # else a moment in which the stage server has the core counts eight times
            made = model.run(names, feeds)
            await asyncio.sleep((SLOWER - 1) * (time.thread_time() - begun_s))
            return made


def load(folder: Path, placement: str) -> PlacedModel:
    """Load the parts for one placement, or for all of them with `auto`; times are a slower device's."""
    placed = file_of((folder / "placed.json").read_text())
    if placement != "auto":
        placed = dataclasses.replace(placed, placements=[placement])
    request = LoadModel(
        id=1, name="model", version=1, path=str(folder / "model.onnx"), sample=str(folder / "sample.safetensors"),
        placed=text_of(placed),
    )  # fmt: skip
    draws = random.Random(0)  # noqa: S311 - jitter
    model = load_placed(request, TailAccess(home=str(folder), device="device"), draws)
    slower = {name: dataclasses.replace(one, run_s=SLOWER * one.run_s) for name, one in model.parts.items()}
    return PlacedModel(model.release, slower, model.tail, draws)


async def settled(model: PlacedModel, sample: Tree, device: SlowDevice) -> None:
    """Let `auto` measure the link and plan, as it does while requests come."""
    keeper = PlacementKeeper(model, sample, device.compute, lambda _: None)
    for number in range(SETTLE_LOOKS):
        await keeper.look(1000.0 * number)
        await model.infer([one.name for one in model.outputs], sample, None, device.compute)


async def run(folder: Path, wish: Mapping[str, Any]) -> dict[str, Any]:
    """Measure one placement: the median latency with one request at a time, or the rate with several in flight."""
    model = load(folder, wish["placement"])
    names = [one.name for one in model.outputs]
    request = LoadModel(id=1, name="model", version=1, path="", sample=str(folder / "sample.safetensors"))
    feeds, device = sample_inputs(request), SlowDevice()
    if wish["placement"] == "auto":
        await settled(model, feeds, device)
    else:
        for _ in range(3):
            await model.infer(names, feeds, None, device.compute)
    taken: list[float] = []

    async def client() -> None:
        while len(taken) < wish["requests"]:
            begun_s = time.perf_counter()
            found = await model.infer(names, feeds, None, device.compute)
            if found.parameters.get("fallback_reason"):
                raise RuntimeError(found.parameters["fallback_reason"])
            taken.append(1e3 * (time.perf_counter() - begun_s))

    begun_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(wish["in_flight"])))
    whole_s = time.perf_counter() - begun_s
    await model.tail.close()
    return {"p50_ms": statistics.median(taken), "per_s": len(taken) / whole_s, "placement": model.current.name}


def main() -> None:
    folder = Path(sys.argv[1])
    for line in sys.stdin:
        sys.stdout.write(json.dumps(asyncio.run(run(folder, json.loads(line)))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
