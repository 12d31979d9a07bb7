"""Centralised SGD over the same number of samples, in large batches on all cores: the limit of the machine."""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.simulation_rivals.common import Finished, Work, run, versions

BATCH = 256


def contest(work: Work, _given: argparse.Namespace) -> Finished:
    work.load()
    model, seconds = work.model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=work.workload.lr)
    for number, cohort in enumerate(work.cohorts, start=1):
        start_s = time.perf_counter()
        pairs = [work.samples(client) for client in cohort]
        inputs, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
        for chosen in torch.randperm(len(labels), generator=torch.Generator().manual_seed(number)).split(BATCH):
            loss = torch.nn.functional.cross_entropy(model(inputs[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds.append(time.perf_counter() - start_s)
    return Finished(seconds, work.accuracy(model.state_dict()), {**versions(), "batch": BATCH})


if __name__ == "__main__":
    run(contest)
