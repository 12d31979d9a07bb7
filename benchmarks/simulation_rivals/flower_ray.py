"""Flower's own simulation engine (Ray), with an app written for speed.

Two actors of one thread each; an actor keeps its model, optimizer and samples from client to client and
reads no DataLoader; the server evaluates once, at the end. Which client a message is for stands in the
message, so that the cohorts are those of all others.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from itertools import pairwise

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.simulation_rivals.common import Finished, Work, quiet, run, train, versions
from benchmarks.simulation_workloads import WORKLOADS

ACTORS = 2


class _Actor:
    """The state of one actor process."""

    def __init__(self, name: str, rounds: int) -> None:
        torch.set_num_threads(1)
        self.work = Work(WORKLOADS[name], rounds)
        self.model = self.work.model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.work.workload.lr)

    def answer(self, message: Message) -> Message:
        told = message.content["config"]
        number, client = told["server-round"], told["client"]
        self.model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        torch.manual_seed(self.work.seed(number, client))  # for dropout
        samples = self.work.ordered(number, client)
        train(self.model, samples, self.work.workload, self.optimizer)
        metrics = MetricRecord({"num-examples": len(samples[1])})
        content = RecordDict({"arrays": ArrayRecord(self.model.state_dict()), "metrics": metrics})
        return Message(content=content, reply_to=message)


@cache
def _actor(name: str, rounds: int) -> _Actor:
    return _Actor(name, rounds)


client_app = ClientApp()


@client_app.train()
def _train(message: Message, _context: Context) -> Message:
    told = message.content["config"]
    return _actor(told["workload"], told["rounds"]).answer(message)


class _FedAvg(FedAvg):
    """FedAvg that sends each client's number, and records when rounds end."""

    def __init__(self, work: Work) -> None:
        super().__init__(fraction_evaluate=0.0)
        self._work = work
        self.ends_s: list[float] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, _config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        if not self.ends_s:
            self.ends_s.append(time.perf_counter())
        said = {"server-round": server_round, "workload": self._work.workload.name, "rounds": self._work.rounds}
        cohort = self._work.cohorts[server_round - 1]
        for node, client in zip(grid.get_node_ids(), cohort, strict=False):
            content = RecordDict({"arrays": arrays, "config": ConfigRecord({**said, "client": client})})
            yield Message(content=content, message_type="train", dst_node_id=node)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        if any(reply.has_error() for reply in replies) or len(replies) != self._work.workload.cohort:
            raise RuntimeError(f"round {server_round}: {len(replies)} replies, not all of them good")
        result = super().aggregate_train(server_round, replies)
        self.ends_s.append(time.perf_counter())
        return result


def contest(work: Work, _given: argparse.Namespace) -> Finished:
    strategy, server_app, ended = _FedAvg(work), ServerApp(), []

    @server_app.main()
    def _main(grid: Grid, _context: Context) -> None:
        ended.append(strategy.start(grid=grid, initial_arrays=ArrayRecord(work.initial()), num_rounds=work.rounds))

    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=work.workload.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": ACTORS, "num_gpus": 0},
        },
    )
    seconds = [after - before for before, after in pairwise(strategy.ends_s)]
    said = {**versions(), "flwr": version("flwr"), "ray": version("ray")}
    return Finished(seconds, work.accuracy(ended[0].arrays.to_torch_state_dict()), said)


if __name__ == "__main__":
    # Imported by its name, so that pickle sends references, which the actors import.
    from benchmarks.simulation_rivals import flower_ray

    quiet()
    run(flower_ray.contest)
