"""The device of `benchmarks.split_training`: a process with a limit of memory, which trains its part and says its peak.

python -m benchmarks.split_device FD SETTINGS
"""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
from collections import deque
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch

from benchmarks.split_workloads import WORKLOADS
from edge_agent.training.split.cached import CachedLoop
from edge_agent.training.split.loop import DeviceLoop, DeviceRun
from edge_agent.training.trainer_main import limit_memory
from edgefl.config import TrainConfig, from_dict
from edgefl.measure import own_peak_mb
from edgefl.offload.training.checkpoints import PartCheckpoints
from edgefl.offload.training.halves import DeviceHalf
from edgefl.offload.training.layout import layout_of
from edgefl.offload.training.model import PartedModel
from edgefl.protocols.split.messages import VERSION, BeginTraining, Frame, FrameReader, Message, pack, parse_frame
from edgefl.training.local import batch_order, derive_seed
from edgefl.training.samples import train_samples
from edgefl.trees import SpooledTree, write_tree
from edgefl.trees.frozen import whole


class PairLink:
    """Frames over a pair of sockets."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._reader, self._frames = connection, FrameReader(), deque[bytes]()

    def send(self, message: Message, *sections: bytes) -> None:
        """Send a frame."""
        self._connection.sendall(pack(message, *sections))

    def receive(self) -> Frame:
        """Return the next frame."""
        while not self._frames:
            data = self._connection.recv(1 << 20)
            if not data:
                raise EOFError("the cloud's process has ended")
            self._frames.extend(self._reader.feed(data))
        return parse_frame(self._frames.popleft())

    def close(self) -> None:
        """Leave it open: there is one."""


def without_optional_libraries() -> None:
    """Hide what transformers imports wherever it finds it, 140 MB, and no small device has."""
    found = importlib.util.find_spec
    hidden = {"sklearn", "scipy", "pandas", "pyarrow"}

    def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name.split(".", maxsplit=1)[0] in hidden else found(name, package)

    importlib.util.find_spec = find_spec


def main() -> None:
    """Train, write the device's tensors, and print the peak."""
    connection, settings = socket.socket(fileno=int(sys.argv[1])), json.loads(sys.argv[2])
    work, folder = WORKLOADS[settings["work"]], Path(settings["folder"])
    config = from_dict(TrainConfig, settings["config"])
    if settings["limit_mb"]:
        without_optional_libraries()
        limit_memory(settings["limit_mb"])
    torch.set_num_threads(1)
    task = work.task()
    model, samples = PartedModel(task=task, config=config), train_samples(task, {})
    seed = derive_seed(config.seed, 1, "bench")
    order = list(batch_order(torch.nn.Module(), samples, config, seed))
    layout = work.layout(config)
    parts, tensors = model.parts(layout), whole(SpooledTree(folder / "moving"), SpooledTree(folder / "frozen"))
    half, link = DeviceHalf(task, model.device_state(parts, tensors), seed), PairLink(connection)
    run = DeviceRun(
        half=half,
        make_parts=lambda inputs: model.parts(layout_of(inputs)),
        samples=samples,
        order=order,
        config=config,
        seed=seed,
        connect=lambda: link,
        checkpoints=PartCheckpoints(folder / "kept" / "device"),
        fresh=lambda: model.device_state(parts, tensors),
        begin=BeginTraining(
            version=VERSION, job="job", round=1, bundle="", samples=len(samples), steps=len(order), inputs=layout
        ),
    )
    (CachedLoop if config.split.sends_once else DeviceLoop)(run).train()
    with (folder / "moved").open("wb") as file:
        write_tree(half.state.moving(), file)
    print(json.dumps({"peak_mb": own_peak_mb()}))


if __name__ == "__main__":
    main()
