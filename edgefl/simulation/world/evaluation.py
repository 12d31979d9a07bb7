"""Federated evaluation of simulated clients: each client's held-out samples.

A task's own loader (`eval_data`) gets the client's data options, as on a device. For a partition of all samples, a
client draws from all held-out samples, so that their labels are distributed as those of its training samples.
Invariant: a client's held-out samples depend only on (seed, client, the labels), and are made on demand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from edgefl.aggregation.evaluations import FederatedEvaluation
from edgefl.errors import TaskError
from edgefl.records import Answer, DeviceEvaluation, Evaluated, Partial, Plan, Update
from edgefl.simulation.engines.fleets import Population, WithEvalSamples, WithOptions
from edgefl.simulation.isolation.at_work import turn_of
from edgefl.simulation.world.draws import Indices, stream_key
from edgefl.task import Task
from edgefl.training.local import data_seed
from edgefl.training.local_evaluation import LocalEvaluator, evaluation_spec
from edgefl.training.randomness import seeded
from edgefl.training.samples import SampleSet


class ClientEvaluations:
    """Evaluates the parameters of one plan after another for clients of a population."""

    def __init__(self, task: Task, population: Population) -> None:
        self._task, self._population, self._spec = task, population, evaluation_spec(task)
        self._evaluator = LocalEvaluator(task)
        self._plan: Plan | None = None

    def begin(self, plan: Plan) -> None:
        """Start with a plan; raises TaskError if its parameters do not match the model."""
        self._plan = plan
        if plan.evaluate:
            self._evaluator.begin(plan.parameters, plan.frozen)

    def of(self, client: str) -> DeviceEvaluation:
        """Return a client's evaluation; a failure is its `fault`."""
        task, population, seed = self._task, self._population, self._begun().train.seed
        try:
            turn_of(client)
        except TaskError as error:
            return DeviceEvaluation(fault=str(error))
        if task.evaluate_locally is None and isinstance(population, WithEvalSamples):

            def load() -> SampleSet:
                with seeded(data_seed(seed, client)):  # a user's own population may draw random numbers
                    return population.eval_samples(client)

            return self._evaluator.of_samples(load)
        if isinstance(population, WithOptions):
            return self._evaluator.of_device(client, population.options(client), seed)
        return DeviceEvaluation(
            fault=f"task {task.name!r}: this population has no held-out samples; give it a method eval_samples(client)"
        )

    def alone(self, client: str) -> Evaluated:
        """Return the answer of a client that only evaluates."""
        plan = self._begun()
        return Evaluated(job=plan.job, round=plan.round, device=client, evaluation=self.of(client))

    def added_to(self, answer: Answer) -> Answer:
        """Return an update or a sum with the evaluations of its clients, if the plan asks for them."""
        if not self._begun().evaluate or self._spec is None:
            return answer
        if isinstance(answer, Update):
            return dataclasses.replace(answer, evaluation=self.of(answer.device))
        if not isinstance(answer, Partial):
            return answer
        found = FederatedEvaluation(self._spec)
        for client in answer.contributors:
            found.add(client, self.of(client))
        return dataclasses.replace(answer, evaluations=found.partial())

    def _begun(self) -> Plan:
        if self._plan is None:
            raise RuntimeError("begin comes before an evaluation")
        return self._plan


class HeldOut:
    """The held-out samples of a partition's clients."""

    def __init__(
        self,
        load: Callable[[], SampleSet],
        labels_of: Callable[[SampleSet], Indices],
        train_labels_n: Indices,
        seed: int,
    ) -> None:
        self._load, self._labels_of, self._seed = load, labels_of, seed
        self._train_labels_n = train_labels_n  # (N,), zeros if the partition is not by label
        self._all: SampleSet | None = None
        self._of_label: dict[int, Indices] = {}

    def draw(self, client: int, own: Indices) -> SampleSet:
        """Return held-out samples for a client with these training samples; raises TaskError if there are none.

        As many of its samples as the held-out set is smaller than the training set, at least one, choose the labels;
        of each label, that many held-out samples are drawn.
        """
        import torch

        everything = self._loaded()
        rng = np.random.default_rng(stream_key(self._seed, "evaluation", client))
        size = max(1, round(len(own) * len(everything) / len(self._train_labels_n)))
        like = rng.choice(own, min(size, len(own)), replace=False) if len(own) else own
        drawn = [
            rng.choice(found, min(int(count), len(found)), replace=False)
            for label, count in zip(*np.unique(self._train_labels_n[like], return_counts=True), strict=True)
            if len(found := self._of_label.get(int(label), own[:0]))
        ]
        if not drawn:
            raise TaskError("the client has no held-out samples: eval_data has none with the labels of its own")
        return everything.chosen(torch.from_numpy(np.concatenate(drawn)).to(everything.device))

    def _loaded(self) -> SampleSet:
        if self._all is None:
            found = self._load()
            labels_n = self._labels_of(found)
            self._of_label = {int(label): np.flatnonzero(labels_n == label) for label in np.unique(labels_n)}
            self._all = found
        return self._all
