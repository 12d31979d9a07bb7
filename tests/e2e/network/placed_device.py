"""A device's placed model in a process of its own network: one request for each line on stdin, one line of JSON back.

    python -m tests.e2e.network.placed_device FOLDER

The line on stdin is the number of rows. Its keeper runs beside it, as in the serving process.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from pathlib import Path

import numpy as np

from edge_agent.placement.keeper import PlacementKeeper
from edge_agent.placement.loading import load_placed
from edge_agent.serving.wire import LoadModel, TailAccess


async def compute(model, names, feeds):
    await asyncio.sleep(0)
    return model.run(names, feeds)


async def main(folder: Path) -> None:
    request = LoadModel(
        id=1, name="net", version=1, path=str(folder / "model.onnx"), placed=(folder / "placed.json").read_text()
    )
    model = load_placed(request, TailAccess(home=str(folder), device="device"), random.Random(1))
    sample = {"x": np.ones((1, 4), np.float32)}
    keeper = asyncio.create_task(PlacementKeeper(model, sample, compute, lambda _: None).run())
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        x = np.arange(4 * int(line), dtype=np.float32).reshape(-1, 4)
        found = await model.infer(["y"], {"x": x}, None, compute)
        sys.stdout.write(json.dumps({**found.parameters, "y": found.results[0].tolist()}) + "\n")
        sys.stdout.flush()
    keeper.cancel()
    await asyncio.wait([keeper])


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
