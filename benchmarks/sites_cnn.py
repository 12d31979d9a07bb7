"""The CNN of `benchmarks.sites`: as a task, and trained by plain DistributedDataParallel under torchrun."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from edgefl import Task

SAMPLES = 4096


class Cnn(nn.Module):
    """Two convolutions and two dense layers on pictures of 3 x 32 x 32; 0.6 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.hidden, self.last = nn.Linear(64 * 64, 128), nn.Linear(128, 10)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        half = torch.max_pool2d(torch.relu(self.first(pictures)), 2)
        quarter = torch.max_pool2d(torch.relu(self.second(half)), 2)
        return self.last(torch.relu(self.hidden(quarter.flatten(1))))


def load() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.random((SAMPLES, 3, 32, 32), np.float32) - 0.5, rng.integers(0, 10, SAMPLES)


task = Task(name="sites-cnn", model=Cnn, loss=cross_entropy, train_data=load)


def plain(epochs: int, batch: int, out: Path) -> None:
    """Train as torch's tutorial does, with channels last as edgefl has them, and write the seconds."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    model = nn.parallel.DistributedDataParallel(Cnn().to(memory_format=torch.channels_last))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sampler = torch.utils.data.DistributedSampler(range(SAMPLES))
    own, start_s, start_cpu_s = batch // dist.get_world_size(), 0.0, 0.0
    for _ in range(2):  # the first one warms up, as ours does
        dist.barrier()
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        inputs, targets = (torch.from_numpy(one) for one in load())  # as an agent does in each round
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            order = torch.tensor(list(sampler))
            for which in order.split(own):
                optimizer.zero_grad()
                pictures = inputs[which].contiguous(memory_format=torch.channels_last)
                cross_entropy(model(pictures), targets[which]).backward()
                optimizer.step()
    cpu_s = torch.tensor(time.process_time() - start_cpu_s)
    dist.all_reduce(cpu_s)
    if dist.get_rank() == 0:
        out.write_text(json.dumps({"seconds": time.perf_counter() - start_s, "cpu_s": float(cpu_s)}))
    dist.destroy_process_group()


if __name__ == "__main__":
    plain(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
