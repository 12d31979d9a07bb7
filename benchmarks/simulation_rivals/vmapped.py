"""`torch.func`: one step for the whole cohort, all cores."""

from __future__ import annotations

import argparse
import time

import torch
from torch.func import functional_call, grad, vmap

from benchmarks.simulation_rivals.common import Finished, State, Work, run, versions


def contest(work: Work, _given: argparse.Namespace) -> Finished:
    work.load()
    model, state, seconds = work.model(), work.initial(), []

    def loss(parameters: State, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(functional_call(model, parameters, (inputs,)), labels)

    gradients = vmap(grad(loss))
    for number, cohort in enumerate(work.cohorts, start=1):
        start_s = time.perf_counter()
        pairs = [work.ordered(number, client) for client in cohort]
        inputs, labels = (torch.stack(part) for part in zip(*pairs, strict=True))
        stack = {name: tensor.expand(len(cohort), *tensor.shape).clone() for name, tensor in state.items()}
        for start in range(0, labels.shape[1], work.workload.batch):
            stop = start + work.workload.batch
            steps = gradients(stack, inputs[:, start:stop], labels[:, start:stop])
            for name, step in steps.items():
                stack[name].sub_(step, alpha=work.workload.lr)
        state = {name: tensor.mean(0) for name, tensor in stack.items()}
        seconds.append(time.perf_counter() - start_s)
    return Finished(seconds, work.accuracy(state), versions())


if __name__ == "__main__":
    run(contest)
