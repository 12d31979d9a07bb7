"""Tasks that several processes train, and by themselves: python -m tests.edgefl.training.parallel.tasks."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from edgefl.config import TrainConfig
from edgefl.errors import TaskError
from edgefl.task import FitResult, Task
from edgefl.training.local import initial_parameters, train_locally
from edgefl.training.parallel.together import Assigned, Loaded, train_together
from edgefl.training.parallel.workers import TrainingGroup
from edgefl.trees import Tree, write_tree
from edgefl.trees.fragments import changed_part


class Net(nn.Module):
    """Convolution, blocks, a parameter that some batches use and one that none uses, a frozen one, a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))
        self.last = nn.Linear(12, 3)
        self.sometimes = nn.Parameter(torch.ones(3))
        self.unused = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("calls", torch.zeros(1, dtype=torch.int64))

    def forward(self, pictures):
        if self.training:
            self.calls += 1
        hidden = torch.relu(self.first(pictures)).flatten(1)
        for block in self.blocks:
            hidden = torch.tanh(block(hidden))
        outputs = self.last(hidden) * self.frozen
        return outputs * self.sometimes if int(self.calls) % 2 else outputs


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, rows):
        return self.last(self.norm(rows))


def pictures(n=11):
    rng = np.random.default_rng(0)
    return rng.random((n, 2, 2, 2)), rng.integers(0, 3, n)


def rows(n=11):
    return pictures(n)[0].reshape(n, 8)[:, :4], pictures(n)[1]


class Disk(torch.utils.data.Dataset):
    def __len__(self):
        return 11

    def __getitem__(self, number):
        inputs, targets = pictures()
        return inputs[number], targets[number]


def own_fit(parameters, config, options):
    """Average the ranks, by the process group that the environment describes."""
    dist.init_process_group("gloo")
    mine = torch.tensor([float(os.environ["RANK"])])
    dist.all_reduce(mine)
    index = __import__("json").loads(os.environ["TF_CONFIG"])["task"]["index"]
    assert index == dist.get_rank()
    return FitResult(tree={"w": mine.numpy()}, weight=dist.get_world_size())


def one_of_two() -> nn.Module:
    """Return another model in the first process."""
    return (Net() if os.environ["RANK"] == "0" else Norm()).double()


NET = Task(name="net", model=lambda: Net().double(), loss=cross_entropy, train_data=pictures)
TASKS = {
    "net": NET,
    "disk": replace(NET, train_data=Disk),
    "adamw": replace(NET, optimizer=lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr)),
    "norm": replace(NET, model=lambda: Norm().double(), train_data=rows),
    "other model": replace(NET, model=one_of_two),
    "other data": replace(NET, train_data=lambda: pictures(11 + int(os.environ["RANK"]))),
    "other sample": replace(NET, train_data=lambda: tuple(one + int(os.environ["RANK"] == "2") for one in pictures())),
    "few": replace(NET, train_data=lambda: pictures(2)),
    "nothing": replace(NET, model=nn.Flatten),
    "fit": Task(name="fit", initial=lambda: {"w": np.zeros(1, np.float32)}, fit=own_fit),
}
CASES = {
    "ddp": ("net", {}),
    "uneven": ("net", {"batch_size": 4, "epochs": 2}),  # 4, 4, 3 samples for three processes
    "steps": ("adamw", {"batch_size": 5, "steps": 5, "lr": 0.01}),
    "kept": ("adamw", {"batch_size": 5, "lr": 0.01, "keep_optimizer_state": True}),
    "fsdp kept": ("adamw", {"strategy": "fsdp", "batch_size": 4, "lr": 0.01, "keep_optimizer_state": True}),
    "fragments": ("adamw", {"batch_size": 5, "lr": 0.01, "fragments": 2, "round": 2}),
    "fsdp fragments": (
        "adamw",
        {"strategy": "fsdp", "batch_size": 4, "lr": 0.01, "fragments": 2, "round": 2, "keep_optimizer_state": True},
    ),
    "disk": ("disk", {"batch_size": 4}),
    "proximal": ("net", {"proximal_mu": 0.5, "batch_size": 4}),
    "last alone": ("net", {"batch_size": 5}),  # the last batch has one sample: two processes have none
    "fedsgd": ("net", {"algorithm": "fedsgd", "batch_size": 5}),
    "fsdp": ("net", {"strategy": "fsdp", "batch_size": 4}),
    "fsdp fedsgd": ("net", {"strategy": "fsdp", "algorithm": "fedsgd", "batch_size": 5}),
    "fsdp adamw": ("adamw", {"strategy": "fsdp", "batch_size": 4, "lr": 0.01, "proximal_mu": 0.1}),
}
OTHERS = {
    "norm": ("norm", {"batch_size": 4}),
    "fit": ("fit", {}),
    "fit again": ("fit", {}),
    "other model": ("other model", {}),
    "other data": ("other data", {}),
    "other sample": ("other sample", {}),
    "few": ("few", {}),
    "small batches": ("net", {"batch_size": 2}),
    "backend": ("net", {"backend": "nonsense"}),
    "nothing": ("nothing", {"strategy": "fsdp"}),
}


def assigned(changes) -> Assigned:
    return Assigned(config=TrainConfig(**{"lr": 0.3} | changes), options={}, round=2, client="cam")


def alone(name: str) -> FitResult:
    """Return what one process makes of a case."""
    task, changes = CASES[name]
    return trained_alone(TASKS[task], assigned(changes))


def trained_alone(task: Task, what: Assigned) -> FitResult:
    """Train in one process, from the state of a former training."""
    return train_locally(
        task, received(task, what), what.config, options={}, round=what.round, client=what.client,
        state=before(task, what),
    )  # fmt: skip


def before(task: Task, what: Assigned) -> Tree | None:
    """Return the state that a client has kept from its former training."""
    if not what.config.keeps_state:
        return None
    start, config = initial_parameters(task), replace(what.config, round=1)
    return train_locally(task, start, config, options={}, round=1, client=what.client).state


def received(task: Task, what: Assigned) -> Tree:
    """Return the parameters that a client receives: with fragments, those that the round before has changed."""
    start = initial_parameters(task)
    if what.config.fragments == 1:
        return start
    return {name: array + 0.125 for name, array in changed_part(start, what.config).items()}


def main(rank: int, size: int, folder: Path) -> None:
    """Train all cases as one of several processes; the last one leads."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    workers = TrainingGroup(
        dist.FileStore(str(folder / "store"), size), rank, size, leads=rank == size - 1, host="127.0.0.1"
    )
    for name, (task, changes) in {**CASES, **OTHERS}.items():
        try:
            chosen, what = TASKS[task], assigned(changes)

            def load(task: Task = chosen, what: Assigned = what) -> Loaded:
                return Loaded(task=task, parameters=received(task, what), state=before(task, what))

            result = train_together(workers, load, what)
        except TaskError as error:
            if not workers.refused:
                raise
            if workers.leads:
                (folder / f"{name}.txt").write_text(str(error))
            workers.refused = False
            continue
        if workers.leads:
            extra = {"_weight": np.array(result.weight), "_loss": np.array(result.metrics.get("train_loss", 0.0))}
            with (folder / name).open("wb") as file:
                write_tree({**result.tree, **extra, **result.state}, file)
        else:
            assert name.startswith("fit") or not result.tree
    if rank == 0:
        workers.raise_alarm("no more power")
    elif workers.leads:
        workers.watch((folder / "alarm").write_text)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
