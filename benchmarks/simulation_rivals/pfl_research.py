"""pfl-research (Apple): SimulatedBackend and FederatedAveraging, in one process or in several by torchrun.

Its own sampler is replaced by one that gives out the cohorts of the benchmark in turn, and its samples
are put into the order of the benchmark; a user costs it no more by that.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Iterator
from importlib.metadata import version

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel

from benchmarks.simulation_rivals.common import Finished, Work, run, versions


class _Net(torch.nn.Module):
    """The interface that pfl requires of a model: a loss, and metrics."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.network(inputs), labels)

    def metrics(self, _inputs: torch.Tensor, _labels: torch.Tensor) -> dict[str, object]:
        return {}


class _Watch(TrainingProcessCallback):
    """Records when rounds end."""

    def __init__(self) -> None:
        super().__init__()
        self.ends_s = [time.perf_counter()]

    def after_central_iteration(self, *_args: object, **_named: object) -> tuple[bool, Metrics]:
        self.ends_s.append(time.perf_counter())
        return False, Metrics()


def contest(work: Work, _given: argparse.Namespace) -> Finished:
    torch.set_num_threads(1)
    work.load()
    network = work.model()
    net = _Net(network)
    model = PyTorchModel(
        model=net,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
    )
    users = _users(work)
    data = FederatedDataset(
        lambda user: PyTorchTensorDataset(work.ordered(*user), user_id=str(user[1])), lambda: next(users)
    )
    watch = _Watch()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=work.rounds,
            evaluation_frequency=work.rounds + 1,
            train_cohort_size=work.workload.cohort,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByUser()]),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_learning_rate=work.workload.lr, local_num_epochs=1, local_batch_size=work.workload.batch
        ),
        callbacks=[watch],
        send_metrics_to_platform=False,
    )
    seconds = [after - before for before, after in itertools.pairwise(watch.ends_s)]
    said = {**versions(), "pfl": version("pfl"), "processes": int(os.environ.get("WORLD_SIZE", "1"))}
    return Finished(seconds, work.accuracy(network.state_dict()), said)


def _users(work: Work) -> Iterator[tuple[int, int]]:
    """Yield (round, client) in the cohorts' order; every process draws all and keeps its own share."""
    for number, cohort in enumerate(work.cohorts, start=1):
        yield from ((number, client) for client in cohort)
    while True:  # pfl may request more in advance
        yield work.rounds, work.cohorts[-1][0]


if __name__ == "__main__":
    run(contest)
