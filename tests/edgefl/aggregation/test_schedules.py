"""The learning rate by round, by hand, and as it reaches clients, engines, optimizers and the server's step."""

import numpy as np
import pytest
import torch
from torch import nn

import edgefl
from edgefl import FitResult, Task
from edgefl.aggregation.schedules import lr_factor, of_round
from edgefl.config import JobConfig, from_dict
from edgefl.errors import ConfigError


def job(count=4, **train):
    return from_dict(JobConfig, {"rounds": {"count": count}, "train": {"lr": 0.5} | train})


@pytest.mark.parametrize(
    ("train", "factors"),
    [
        ({}, [1, 1, 1, 1]),
        ({"warmup_rounds": 2}, [0.5, 1, 1, 1]),
        ({"schedule": "cosine"}, [1, 0.8535534, 0.5, 0.1464466]),
        ({"schedule": "cosine", "end_factor": 0.5}, [1, 0.9267767, 0.75, 0.5732233]),
        ({"schedule": "cosine", "warmup_rounds": 3}, [1 / 3, 2 / 3, 1, 0.5]),
        ({"schedule": "step", "step_rounds": 2, "step_factor": 0.1}, [1, 1, 0.1, 0.1]),
        ({"schedule": "step", "step_rounds": 1, "step_factor": 0.5, "warmup_rounds": 2}, [0.5, 1, 0.5, 0.25]),
    ],
)
def test_factors_by_hand(train, factors):
    config = job(**train)
    assert [lr_factor(config.train, 4, number) for number in range(1, 5)] == pytest.approx(factors)
    assert [of_round(config, number).round for number in range(1, 5)] == [1, 2, 3, 4]


def test_a_constant_rate_is_the_configured_one_and_none_falls_to_zero():
    assert of_round(job(lr=0.1), 3).lr == 0.1
    assert of_round(job(schedule="step", step_rounds=1, step_factor=0.0), 4).lr > 0


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"schedule": "linear"}, "train.schedule='linear' is not one of: constant, cosine, step"),
        ({"warmup_rounds": -1}, "train.warmup_rounds=-1"),
        ({"end_factor": 1.5}, "train.end_factor=1.5"),
        ({"step_rounds": 0}, "train.step_rounds=0"),
        ({"step_factor": float("nan")}, "train.step_factor=nan"),
    ],
)
def test_parameters_are_checked_at_birth(train, message):
    with pytest.raises(ConfigError) as refusal:
        job(**train)
    assert message in str(refusal.value)


class Weight(nn.Module):
    """A weight whose gradient is 1: a step takes the learning rate off it."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, inputs):
        return inputs * self.w


def samples(part="0", parts="1"):
    return torch.ones(4, 1), torch.zeros(4, 1)


def mean_output(outputs, _targets):
    return outputs.mean()


TASK = Task(name="weight", model=Weight, loss=mean_output, train_data=samples)
COSINE = job(schedule="cosine")
SUM = 0.5 * (1 + 0.8535534 + 0.5 + 0.1464466)


@pytest.mark.parametrize("engine", ["loop", "stacked"])
def test_engines_take_each_rounds_rate(engine):
    result = edgefl.simulate(TASK, clients=2, engine=engine, config=COSINE)
    assert result.parameters["w"][0] == pytest.approx(-SUM, rel=1e-5)


@pytest.mark.parametrize("server", [{}, {"optimizer": "SGD", "options": {"momentum": 0.0, "dampening": 0.0}}])
def test_of_fedsgd_it_is_the_servers_rate(server):
    train = {"algorithm": "fedsgd", "schedule": "cosine"}
    config = from_dict(JobConfig, {"rounds": {"count": 4}, "train": train, "server": {"lr": 0.5} | server})
    result = edgefl.simulate(TASK, clients=2, engine="loop", config=config)
    assert result.parameters["w"][0] == pytest.approx(-SUM, rel=1e-5)


def test_fit_and_the_users_optimizer_hear_the_round():
    heard = []

    def fit(_tree, config, _options):
        heard.append((config.round, config.lr))
        return FitResult(tree={"w": np.full(1, -config.lr)}, weight=1)

    own = Task(name="own", initial=lambda: {"w": np.zeros(1)}, fit=fit)
    result = edgefl.simulate(own, clients=1, engine="loop", config=COSINE)
    assert [number for number, _ in heard] == [1, 2, 3, 4]
    assert result.parameters["w"][0] == pytest.approx(-SUM, rel=1e-6)

    def by_round(parameters, lr, round):
        heard.append((round, lr))
        return torch.optim.SGD(parameters, lr)

    def by_config(parameters, lr, *, config):
        heard.append((config.round, lr))
        return torch.optim.SGD(parameters, lr)

    for optimizer in (by_round, by_config, torch.optim.SGD):
        heard.clear()
        told = Task(name="t", model=Weight, loss=mean_output, train_data=samples, optimizer=optimizer)
        result = edgefl.simulate(told, clients=1, engine="loop", config=COSINE)
        assert result.parameters["w"][0] == pytest.approx(-SUM, rel=1e-5)
        assert [number for number, _ in heard] in ([], [1, 2, 3, 4])
        assert bool(heard) == (optimizer in (by_round, by_config))
