"""The common start and result of all systems."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from benchmarks.simulation_workloads import WORKLOADS, Workload
from edgefl.rounds import select_clients
from edgefl.simulation.world.names import Names
from edgefl.training.evaluation import evaluate
from edgefl.training.local import derive_seed, initial_parameters

Samples = tuple[torch.Tensor, torch.Tensor]
State = dict[str, torch.Tensor]


class Work:
    """A prepared workload: cohorts, samples, orders and initial weights."""

    def __init__(self, workload: Workload, rounds: int) -> None:
        self.workload, self.rounds = workload, rounds
        self.config = workload.config(rounds)
        self.names = Names(workload.clients)
        self._kept: dict[int, Samples] = {}

    @cached_property
    def cohorts(self) -> list[list[int]]:
        """The clients of each round, by number; round 1 is the first."""
        drawn = (select_clients(self.names, self.config, number) for number in range(1, self.rounds + 1))
        return [[self.names.index(name) for name in cohort] for cohort in drawn]

    def seed(self, round_number: int, client: int) -> int:
        return derive_seed(self.config.train.seed, round_number, self.names[client])

    def samples(self, client: int) -> Samples:
        """Return a client's own samples; they stay in memory, as in every system."""
        if client not in self._kept:
            inputs, labels = self.workload.task.train_data(part=str(client), parts=str(self.workload.clients))
            self._kept[client] = (torch.from_numpy(inputs), torch.from_numpy(labels))
        return self._kept[client]

    def ordered(self, round_number: int, client: int) -> Samples:
        """Return a client's samples in the order in which it goes through them in this round."""
        inputs, labels = self.samples(client)
        shuffle = torch.Generator().manual_seed(self.seed(round_number, client))
        order = torch.randperm(len(labels), generator=shuffle)
        return inputs[order], labels[order]

    def load(self) -> None:
        """Load all data of the rounds before the timing starts."""
        for client in sorted({client for cohort in self.cohorts for client in cohort}):
            self.samples(client)

    def initial(self) -> State:
        return {name: torch.from_numpy(np.array(array)) for name, array in self._initial.items()}

    def model(self, state: State | None = None) -> torch.nn.Module:
        """Make the model, with the initial weights unless others are given."""
        model = self.workload.task.model()
        model.load_state_dict(state if state is not None else self.initial())
        return model

    def accuracy(self, state: Mapping[str, torch.Tensor]) -> float:
        """Return the fraction of held-out samples that a model classifies correctly."""
        tree = {name: tensor.detach().cpu().numpy() for name, tensor in state.items()}
        return evaluate(self.workload.task, tree)["accuracy"]

    @cached_property
    def _initial(self) -> Mapping[str, np.ndarray]:
        return initial_parameters(self.workload.task, self.config.train.seed)


@dataclass(frozen=True)
class Finished:
    """A system's result."""

    round_s: list[float]
    accuracy: float | None
    detail: Mapping[str, object]

    def tell(self) -> None:
        if os.environ.get("RANK", "0") == "0":  # only one of several processes prints
            said = {"round_s": self.round_s, "accuracy": self.accuracy, "detail": dict(self.detail)}
            print(json.dumps(said), flush=True)


def run(contest: Callable[[Work, argparse.Namespace], Finished], *options: tuple[str, type, object]) -> None:
    """Read the command line, run the system, and print its result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workload", choices=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, required=True)
    for name, kind, default in options:
        parser.add_argument(f"--{name}", type=kind, default=default)
    given = parser.parse_args()
    contest(Work(WORKLOADS[given.workload], given.rounds), given).tell()


def train(model: torch.nn.Module, samples: Samples, workload: Workload, optimizer: torch.optim.Optimizer) -> None:
    """One epoch of minibatch SGD as anyone would write it, without a DataLoader."""
    inputs, labels = samples
    for start in range(0, len(labels), workload.batch):
        stop = start + workload.batch
        loss = torch.nn.functional.cross_entropy(model(inputs[start:stop]), labels[start:stop])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def versions() -> dict[str, object]:
    return {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}


def quiet() -> None:
    """Switch off telemetry in all that is started here."""
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
