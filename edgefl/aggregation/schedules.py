"""The learning rate by round: constant, cosine or step, after a warm-up.

    cosine  end + (1 - end) * (1 + cos(pi * t)) / 2, t from 0 to 1   (Loshchilov & Hutter 2017, without restarts)
    step    factor ** (rounds so far // step_rounds)
    warm-up the rate rises in a straight line, and is whole in round `warmup_rounds`

A round's plan carries the rate of that round and its number, so that devices and every engine of a simulation train
by the same. Of FedSGD, whose one step is the server's, it is the server's rate that is scaled.
Invariant: what is constant and without warm-up is the configured rate itself, bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
import sys

from edgefl.config import JobConfig, TrainConfig


def lr_factor(train: TrainConfig, num_rounds: int, number: int) -> float:
    """Return what the rate is multiplied by in round `number`, from 1."""
    warmup = train.warmup_rounds
    if number < warmup:
        return number / warmup
    done, left = number - max(1, warmup), num_rounds - max(0, warmup - 1)  # rounds after the warm-up, and of them all
    if train.schedule == "cosine":
        share = min(1.0, done / max(1, left))
        return train.end_factor + (1 - train.end_factor) * (1 + math.cos(math.pi * share)) / 2
    if train.schedule == "step":
        return float(train.step_factor ** (done // train.step_rounds))
    return 1.0


def of_round(config: JobConfig, number: int) -> TrainConfig:
    """Return what clients are told in a round: its number, and its rate, which stays above 0."""
    factor = lr_factor(config.train, config.rounds.count, number)
    lr = max(config.train.lr * factor, sys.float_info.min)
    return dataclasses.replace(config.train, lr=lr, round=number)


def server_factor(config: JobConfig, train: TrainConfig) -> float:
    """Return what the server's rate is multiplied by in the round of a plan's `train`."""
    return train.lr / config.train.lr if config.train.algorithm == "fedsgd" else 1.0
