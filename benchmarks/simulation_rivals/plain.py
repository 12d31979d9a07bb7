"""A plain loop in PyTorch: one client after another, in one process or in several with one thread each."""

from __future__ import annotations

import argparse
import multiprocessing
import time
from multiprocessing.connection import Connection

import torch

from benchmarks.simulation_rivals.common import Finished, State, Work, run, train, versions
from benchmarks.simulation_workloads import WORKLOADS

ANSWER_S = 300.0  # for a worker's share of one round


class Trainer:
    """One model and one optimizer, for one client after another."""

    def __init__(self, work: Work) -> None:
        torch.set_num_threads(1)
        self._work = work
        self._model = work.model()
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=work.workload.lr)
        work.load()

    def total(self, round_number: int, state: State, clients: list[int]) -> State:
        """Return the sum of the clients' trained weights; all clients have the same number of samples."""
        own, total = self._model.state_dict(), {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        for client in clients:
            self._model.load_state_dict(state)
            torch.manual_seed(self._work.seed(round_number, client))  # for dropout
            train(self._model, self._work.ordered(round_number, client), self._work.workload, self._optimizer)
            for name in total:
                total[name] += own[name]
        return total


def contest(work: Work, given: argparse.Namespace) -> Finished:
    team: _Alone | _Team = _Alone(work) if given.processes == 1 else _Team(work, given.processes)
    state, seconds = work.initial(), []
    for number, cohort in enumerate(work.cohorts, start=1):
        start_s = time.perf_counter()
        total = team.total(number, state, cohort)
        state = {name: tensor / len(cohort) for name, tensor in total.items()}
        seconds.append(time.perf_counter() - start_s)
    team.close()
    return Finished(seconds, work.accuracy(state), {**versions(), "processes": given.processes})


class _Alone(Trainer):
    def close(self) -> None:
        """Nothing was started."""


class _Team:
    def __init__(self, work: Work, processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(work.workload.name, work.rounds, theirs))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        for pipe in self._pipes:
            _answer(pipe)

    def total(self, round_number: int, state: State, clients: list[int]) -> State:
        arrays = {name: tensor.numpy() for name, tensor in state.items()}
        for index, pipe in enumerate(self._pipes):
            pipe.send((round_number, arrays, clients[index :: len(self._pipes)]))
        totals = [_answer(pipe) for pipe in self._pipes]
        return {name: torch.from_numpy(sum(total[name] for total in totals)) for name in state}

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.join(ANSWER_S)


def _answer(pipe: Connection) -> State:
    if not pipe.poll(ANSWER_S):
        raise TimeoutError(f"a worker gave no answer within {ANSWER_S:g} s")
    return pipe.recv()


def _serve(name: str, rounds: int, pipe: Connection) -> None:
    trainer = Trainer(Work(WORKLOADS[name], rounds))
    pipe.send("ready")
    while True:
        try:
            number, arrays, clients = pipe.recv()
        except EOFError:
            return
        state = {key: torch.from_numpy(array) for key, array in arrays.items()}
        pipe.send({key: tensor.numpy() for key, tensor in trainer.total(number, state, clients).items()})


if __name__ == "__main__":
    run(contest, ("processes", int, 1))
