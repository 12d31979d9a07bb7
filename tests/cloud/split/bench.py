"""A device's loop and the cloud's session in one process, with a link between them that a test can cut."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import torch

from cloud.split.cache import CacheQuota
from cloud.split.records import SessionSpec
from cloud.split.results import SplitFolder
from cloud.split.sessions import CloudJob
from edge_agent.training.split.cached import CachedLoop
from edge_agent.training.split.link import LinkLost
from edge_agent.training.split.loop import DeviceLoop, DeviceRun
from edgefl import Task
from edgefl.config import TrainConfig
from edgefl.offload.training.auxiliary import AuxiliaryLoss
from edgefl.offload.training.checkpoints import PartCheckpoints
from edgefl.offload.training.halves import DeviceHalf
from edgefl.offload.training.layout import layout_of
from edgefl.offload.training.model import PartedModel
from edgefl.protocols.split.messages import VERSION, BeginTraining, Frame, pack, parse_frame
from edgefl.settings.split import SplitConfig
from edgefl.training.local import batch_order, derive_seed, initial_parameters
from edgefl.training.samples import train_samples
from edgefl.trees import write_tree

SERVER = "127.0.0.1:1"


def settings(split: dict[str, Any] | None = None, **train: Any) -> TrainConfig:
    chosen = {"cut": "first", "server": SERVER, "checkpoint_steps": 3} | (split or {})
    return TrainConfig(
        **({"mode": "split", "batch_size": 8, "lr": 0.05, "round": 1} | train), split=SplitConfig(**chosen)
    )


class DirectLink:
    """Hands each frame to the session, and keeps its answer; `cut_after` frames it is lost."""

    def __init__(self, bench: Bench, spec: SessionSpec, cut_after: int | None) -> None:
        self._bench, self._spec, self._left = bench, spec, cut_after
        self._answers: deque[bytes] = deque()
        self.sent_bytes = self.received_bytes = 0

    def send(self, message: Any, *sections: bytes) -> None:
        data = pack(message, *sections)
        self.sent_bytes += len(data)
        self._bench.sent.append(message)
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise LinkLost("cut by the test")
        frame = parse_frame(data[4:])
        self._answers.append(self._bench.cloud.session(self._spec).handle(frame))

    def receive(self) -> Frame:
        data = self._answers.popleft()
        self.received_bytes += len(data)
        return parse_frame(data[4:])

    def close(self) -> None:
        self._answers.clear()


class Bench:
    """One job in parts, below a folder."""

    def __init__(self, task: Task, config: TrainConfig, folder: Path, *, cache_bytes: int = 1 << 24) -> None:
        self.task, self.config, self._folder = task, config, folder
        self._cache_bytes = cache_bytes
        self.tensors = initial_parameters(task, config.seed)
        self.blob = folder / "tensors"
        with self.blob.open("wb") as file:
            write_tree(self.tensors, file)
        self.files = SplitFolder(folder / "home", "job-1")
        self.sent: list[Any] = []
        self.restart_cloud()

    def restart_cloud(self) -> None:
        """Begin with a new training process, which has what is on disk."""
        model = PartedModel(task=self.task, config=self.config)
        self.cloud = CloudJob(
            model=model, folder=self.files, quota=CacheQuota(self._cache_bytes, 4 * self._cache_bytes)
        )

    def spec(self, loop: DeviceLoop, device: str) -> SessionSpec:
        begin = loop.run.begin
        return SessionSpec(
            device=device, round=begin.round, tensors=str(self.blob), inputs=begin.inputs, train=self.config,
            samples=begin.samples, steps=begin.steps, rank=begin.rank,
        )  # fmt: skip

    def device(
        self, name: str = "device-1", cuts: Any = (), options: dict[str, str] | None = None, rank: int | None = None
    ) -> DeviceLoop:
        """Return a device's loop; its n-th connection is lost after `cuts[n]` frames."""
        model, config = PartedModel(task=self.task, config=self.config, rank=rank), self.config
        samples = train_samples(self.task, options or {})
        seed = derive_seed(config.seed, config.round, name)
        order = list(batch_order(torch.nn.Module(), samples, config, seed))
        layout = layout_of(samples.first(-(-len(order[0]) // config.split.micro_batches)).inputs)
        parts = model.parts(layout)
        pending = deque(cuts)

        def connect() -> DirectLink:
            cut = pending.popleft() if pending else None
            if callable(cut):
                cut = cut()
            return DirectLink(self, self.spec(loop, name), cut)

        run = DeviceRun(
            half=DeviceHalf(self.task, model.device_state(parts, self.tensors), seed),
            make_parts=lambda inputs: model.parts(layout_of(inputs)), samples=samples, order=order, config=config,
            seed=seed, connect=connect, checkpoints=PartCheckpoints(self._folder / "kept" / name),
            fresh=lambda: model.device_state(parts, self.tensors), pause=lambda _: None,
            auxiliary=AuxiliaryLoss(self.task, config) if config.split.gradients == "auxiliary" else None,
            begin=BeginTraining(
                version=VERSION, job="job-1", round=config.round, bundle="0" * 64, samples=len(samples),
                steps=len(order), inputs=layout, rank=rank or 0,
            ),
        )  # fmt: skip
        loop = (CachedLoop if config.split.sends_once else DeviceLoop)(run)
        return loop

    def both(self, loop: DeviceLoop, name: str = "device-1") -> dict[str, torch.Tensor]:
        """Return the tensors of both sides after a training."""
        found = self.files.result(self.config.round, name)
        assert found is not None
        return {**loop.run.half.state.tensors, **{key: torch.tensor(one) for key, one in found[0].items()}}
