"""The learning rate by round: constant, cosine or step, after a warm-up.

    cosine  end + (1 - end) * (1 + cos(pi * t)) / 2, t from 0 to 1   (Loshchilov & Hutter 2017, without restarts)
    step    factor ** (rounds so far // step_rounds)
    warm-up the rate rises linearly, and has its full value in round `warmup_rounds`

A round's plan holds the round's number and learning rate, so that devices and every simulation engine train with
the same. In FedSGD only the server takes a step, so the server's rate is scaled instead.
Invariant: a constant rate without warm-up is exactly the configured rate, bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
import sys

from edgefl.config import JobConfig, TrainConfig


def lr_factor(train: TrainConfig, num_rounds: int, number: int) -> float:
    """Return the factor of the learning rate in round `number`, from 1."""
    warmup = train.warmup_rounds
    if number < warmup:
        return number / warmup
    done, left = number - max(1, warmup), num_rounds - max(0, warmup - 1)  # rounds since warm-up; all rounds after it
    if train.schedule == "cosine":
        share = min(1.0, done / max(1, left))
        return train.end_factor + (1 - train.end_factor) * (1 + math.cos(math.pi * share)) / 2
    if train.schedule == "step":
        return float(train.step_factor ** (done // train.step_rounds))
    return 1.0


def of_round(config: JobConfig, number: int) -> TrainConfig:
    """Return the clients' configuration of a round: with its number, fragments, and rate, which stays above 0."""
    factor = lr_factor(config.train, config.rounds.count, number)
    lr = max(config.train.lr * factor, sys.float_info.min)
    return dataclasses.replace(config.train, lr=lr, round=number, fragments=config.server.fragments)


def server_factor(config: JobConfig, train: TrainConfig) -> float:
    """Return the factor of the server's learning rate in the round that `train` is for."""
    return train.lr / config.train.lr if config.train.algorithm == "fedsgd" else 1.0
