"""Train many clients as one computation: `torch.func` maps one step over a stack of models and batches.

It is faster for small models, whose steps are mostly overhead. Data of different lengths is padded and masked
exactly. Invariant: each client's update equals that of `train_epochs`, up to rounding;
`edgefl.simulation.engines.stackable` says for which tasks this is possible.
"""

# Shapes: K = clients in the stack, S = steps of the longest, B = batch size.

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from edgefl.config import TrainConfig
from edgefl.errors import TaskError
from edgefl.guards import MAX_METRIC
from edgefl.records import Answer, Failure, Partial, Plan, Update
from edgefl.simulation.engines.fleets import Population, TrainingMethod
from edgefl.simulation.steps import Batch, FactoredGradients, StackedStep, make_stacked_step
from edgefl.simulation.world.evaluation import ClientEvaluations
from edgefl.simulation.world.population import samples_of
from edgefl.task import Task, UserCode
from edgefl.training.local import as_sent, derive_seed, make_model, set_parameters
from edgefl.training.quiet import quiet_stacks
from edgefl.training.samples import Samples
from edgefl.training.structures import Structure, arguments, mapped
from edgefl.trees.frozen import whole
from edgefl.trees.tensors import array_of

if TYPE_CHECKING:
    import torch

MAX_STACK = 256  # clients
SMALL_BYTES = 32 << 10  # size of one client's tensor
STACK_BYTES = 24 << 20  # of parameters: larger stacks exceed the caches and are slower

_Tensors = dict[str, Any]  # tensors by name; of a stack: (K, ...)


NOT_IN_MEMORY = "its samples are a Dataset, read batch by batch; stacked are samples in memory"


def kind_of(samples: Samples) -> tuple[object, ...]:
    """Return the properties that must be equal for samples in one stack."""
    import torch

    inputs, targets = samples.inputs, samples.targets
    if isinstance(inputs, torch.Tensor) and isinstance(targets, torch.Tensor):  # asked for each client of a round
        return inputs.shape[1:], inputs.dtype, targets.shape[1:], targets.dtype
    batch = Batch.of(inputs, targets)
    return (batch.form, batch.width(), *(one.dtype for one in batch.tensors))


@dataclass(frozen=True, slots=True)
class Stack:
    """Clients trained together."""

    clients: tuple[str, ...]
    start: Mapping[str, torch.Tensor]  # in the plan's order of names
    trained: Mapping[str, torch.Tensor]  # (K, ...), of the trained clients
    weights: torch.Tensor  # (K,), float64
    losses: torch.Tensor  # (K,), float64

    def updates(self, plan: Plan) -> Iterator[tuple[str, Update]]:
        """Yield each client's update."""
        yield from ((self.clients[k], self._update(plan, k)) for k in range(len(self.clients)))

    def summed(self, plan: Plan) -> Iterator[Update | Partial]:
        """Yield one sum of all updates that a guard admits, and single updates that it will refuse."""
        import torch

        finite = self.losses.abs() <= MAX_METRIC  # False for NaN
        if finite.all():
            everything = self._sum(finite)
            if all(np.isfinite(total).all() for total in everything.total.values()):  # then all its summands are finite
                yield everything
                return
        for new in self.trained.values():
            finite &= torch.isfinite(_rows(new)).all(1)
        for k in torch.nonzero(~finite).flatten().tolist():
            yield self._update(plan, k)
        if finite.any():
            yield self._sum(finite)

    def _sum(self, chosen: torch.Tensor) -> Partial:
        """Return the weighted sum of the chosen clients; `chosen` is (K,) of booleans."""
        import torch

        weights = torch.where(chosen, self.weights, 0.0)
        picked = torch.nonzero(chosen).flatten().tolist()
        losses = torch.where(chosen, self.losses, 0.0)
        return Partial(
            total={name: self._total(name, weights, picked).cpu().numpy() for name in self.start},
            weight=float(weights.sum()),
            contributors=tuple(self.clients[k] for k in picked),
            metrics={"train_loss": (float(weights @ losses), float(weights.sum()))},
        )

    def _total(self, name: str, weights: torch.Tensor, picked: Sequence[int]) -> torch.Tensor:
        """Return sum_k weight_k * (new_k - start), as sum_k weight_k * new_k - sum_k weight_k * start, in float64."""
        import torch

        start = self.start[name]
        if name not in self.trained:
            return torch.zeros_like(start, dtype=torch.float64)
        new = self.trained[name]
        if start.nbytes <= SMALL_BYTES and len(picked) == len(weights):
            total = (weights @ _rows(new).double()).reshape(start.shape)
        else:
            total = torch.zeros_like(start, dtype=torch.float64)
            for k in picked:  # for large tensors, a float64 copy of all would cost as much as the training
                total.add_(new[k], alpha=float(weights[k]))
        return total.sub_(start, alpha=float(weights.sum()))

    def _update(self, plan: Plan, k: int) -> Update:
        import torch

        tree = {
            name: array_of(self.trained[name][k] - start if name in self.trained else torch.zeros_like(start))
            for name, start in self.start.items()
        }
        metrics = {"train_loss": float(self.losses[k])}
        sent = as_sent(tree, plan.train, plan.round, self.clients[k])
        return Update(
            job=plan.job, round=plan.round, device=self.clients[k], tree=sent, weight=float(self.weights[k]),
            metrics=metrics,
        )  # fmt: skip


def _rows(stacked: torch.Tensor) -> torch.Tensor:
    """Return a stack with one row per client, (K, D); also for 0-d or empty tensors."""
    return stacked.reshape(len(stacked), math.prod(stacked.shape[1:]))


class StackTrainer:
    """Trains stacks of clients of one population; call `begin` for each plan."""

    def __init__(self, task: Task, population: Population, method: TrainingMethod | None = None) -> None:
        self._task, self._population = task, population
        self._model = make_model(task)
        self._step = _StepOf(task, self._model, method or TrainingMethod())
        self._start: _Tensors = {}
        self._plan: Plan | None = None
        self._evaluations = ClientEvaluations(task, population)

    @property
    def start(self) -> Mapping[str, torch.Tensor]:
        """Return the parameters of the current plan, in its order."""
        return self._start

    def begin(self, plan: Plan) -> None:
        """Start with a plan; raises TaskError if its parameters do not match the model."""
        set_parameters(self._task, self._model, whole(plan.parameters, plan.frozen))
        self._evaluations.begin(plan)
        self._model.train()
        state = self._model.state_dict()
        self._start = {name: state[name].clone() for name in plan.parameters}
        self._plan = plan

    def stacks(self, clients: Sequence[str]) -> Iterator[Sequence[str]]:
        """Yield clients in stacks of the best size."""
        a_client = sum(start.nbytes for start in self._start.values())
        size = max(1, min(MAX_STACK, STACK_BYTES // max(1, a_client)))
        num_stacks = math.ceil(len(clients) / size)
        for k in range(num_stacks):  # of equal size, up to one client
            yield clients[k * len(clients) // num_stacks : (k + 1) * len(clients) // num_stacks]

    def answers(self, clients: Sequence[str], *, sums: bool) -> Iterator[Answer]:
        """Train one stack; yields partial sums and failures, or each client's answer in order.

        If the plan asks for evaluations, clients evaluate one after another: their models are the same.
        """
        plan = self._begun()
        if not plan.fit:
            yield from map(self._evaluations.alone, clients)
            return
        yield from map(self._evaluations.added_to, self._trained(plan, clients, sums=sums))

    def _trained(self, plan: Plan, clients: Sequence[str], *, sums: bool) -> Iterator[Answer]:
        held: dict[tuple[object, ...], dict[str, Samples]] = {}
        failed: dict[str, str] = {}
        for client in clients:
            try:
                samples = samples_of(self._population, client, plan.train.seed)
            except TaskError as error:
                failed[client] = str(error)
            else:
                if isinstance(samples, Samples):
                    held.setdefault(kind_of(samples), {})[client] = samples
                else:
                    failed[client] = (
                        f"client {client!r} cannot be stacked: {NOT_IN_MEMORY}. Use the engine loop or pool"
                    )
        stacks = [self.train(one) for one in held.values()]
        if sums:
            yield from (answer for stack in stacks for answer in stack.summed(plan))
            stacks = []
        updates = {client: update for stack in stacks for client, update in stack.updates(plan)}
        for client in clients:  # in the plan's order, as the loop yields them
            if client in updates:
                yield updates[client]
            elif client in failed:
                yield Failure(job=plan.job, round=plan.round, device=client, reason=failed[client])

    def train(self, held: Mapping[str, Samples]) -> Stack:
        """Train clients whose samples are of one kind; raises TaskError for errors of the user's code."""
        import torch

        clients = sorted(held, key=lambda client: -len(held[client]))
        samples = [held[client] for client in clients]
        plan = self._begun()
        seeds = [derive_seed(plan.train.seed, plan.round, client) for client in clients]
        with UserCode(self._task.name, "stacked training"):
            trained, totals = self._steps(StackedBatches(samples, seeds, plan.train), plan.train, len(clients))
        weights = torch.tensor([len(one) for one in samples], dtype=torch.float64, device=totals.device)
        seen = torch.tensor([plan.train.num_trained(len(one)) for one in samples], dtype=torch.float64)
        return Stack(tuple(clients), self._start, trained, weights, totals / seen.to(totals.device))

    def _begun(self) -> Plan:
        if self._plan is None:
            raise RuntimeError("begin comes before train")
        return self._plan

    def _steps(self, batches: StackedBatches, train: TrainConfig, num_clients: int) -> tuple[_Tensors, torch.Tensor]:
        """Return the trained parameters, (K, ...) each, and each client's sum of losses, (K,)."""
        import torch

        anchors = [self._start[name] for name in self._step.trained]
        stacked = [anchor.expand(num_clients, *anchor.shape).clone() for anchor in anchors]
        totals = torch.zeros(num_clients, dtype=torch.float64, device=stacked[0].device)
        for step in batches:
            active = [tensor[: len(step)] for tensor in stacked]
            gradients = self._step(active, step)
            if train.proximal_mu:
                pulls = [tensor - anchor for tensor, anchor in zip(active, anchors, strict=True)]
            gradients.apply(active, train.lr)
            if train.proximal_mu:
                torch._foreach_add_(active, pulls, alpha=-train.lr * train.proximal_mu)
            totals[: len(step)] += gradients.loss.detach() * step.counts
        return dict(zip(self._step.trained, stacked, strict=True)), totals


class _StepOf:
    """The gradient and loss of one batch of each client in a stack."""

    def __init__(self, task: Task, model: torch.nn.Module, method: TrainingMethod) -> None:
        from torch.func import grad_and_value, vmap

        quiet_stacks()
        self.trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._fixed = {name: one.detach() for name, one in model.named_parameters() if not one.requires_grad}
        self._task, self._model, self._method = task, model, method
        self._full, self._masked = (
            vmap(grad_and_value(mean), randomness="error") for mean in (self._mean, self._masked_mean)
        )
        self._steps: dict[object, StackedStep] = {}

    def __call__(self, parameters: Sequence[torch.Tensor], step: Step) -> FactoredGradients:
        """Return the gradients of `trained`, (K, ...) each, and the losses, (K,)."""
        batch = Batch.of(step.inputs, step.targets)
        key = (batch.form, step.mask is None)
        if key not in self._steps:
            self._steps[key] = make_stacked_step(
                self._task,
                self._flat(self._full if step.mask is None else self._masked, batch),
                len(self.trained),
                compiled=self._method.compiled,
                recorded=self._method.recorded,
            )
        masks = () if step.mask is None else (step.mask, step.counts)
        return self._steps[key](*parameters, *batch.tensors, *masks)

    def _flat(self, over_clients: Callable[..., Any], like: Batch) -> Callable[..., tuple[Any, ...]]:
        """Turn (parameters by name, batch) -> (gradients by name, losses) into a function from tensors to tensors."""
        first, last = len(self.trained), len(self.trained) + len(like.tensors)

        def step(*tensors: Any) -> tuple[Any, ...]:
            named = dict(zip(self.trained, tensors[:first], strict=True))
            gradients, losses = over_clients(named, *like.structures(tensors[first:last]), *tensors[last:])
            return (*(gradients[name] for name in self.trained), losses)

        return step

    def _mean(self, parameters: _Tensors, inputs: Any, targets: Any) -> Any:
        return self._loss(self._outputs(parameters, inputs), targets)

    def _masked_mean(self, parameters: _Tensors, inputs: Any, targets: Any, mask: Any, count: Any) -> Any:
        import torch

        each = torch.func.vmap(lambda output, target: self._loss(mapped(_as_batch, output), mapped(_as_batch, target)))
        losses = each(self._outputs(parameters, inputs), targets)  # (B,)
        return torch.where(mask, losses, 0.0).sum() / count

    def _outputs(self, parameters: _Tensors, inputs: Any) -> Any:
        import torch

        return torch.func.functional_call(self._model, (parameters, self._fixed), *arguments(self._model, inputs))

    def _loss(self, outputs: Any, targets: Any) -> Any:
        if self._task.loss is None:
            raise TaskError(f"task {self._task.name!r} has no loss")
        return self._task.loss(outputs, targets).reshape(())


def _as_batch(one: torch.Tensor) -> torch.Tensor:
    return one[None]


@dataclass(frozen=True, slots=True)
class Step:
    """One batch of each of the first K clients."""

    inputs: Structure  # of tensors, (K, B, ...) each
    targets: Structure  # of tensors, (K, B, ...) each
    mask: torch.Tensor | None  # (K, B); None where every batch is full
    counts: torch.Tensor  # (K,) number of valid samples

    def __len__(self) -> int:
        return len(self.counts)


class StackedBatches:
    """All steps of a stack of clients; clients with the most samples come first."""

    def __init__(self, samples: Sequence[Samples], seeds: Sequence[int], config: TrainConfig) -> None:
        import torch

        self._samples = joined(samples)
        self._num_steps = [config.num_steps(len(one)) for one in samples]
        shape = (self._num_steps[0], len(samples), min(config.batch_size, len(samples[0])))
        self._indices = torch.zeros(shape, dtype=torch.int32)  # (S, K, B)
        self._counts = torch.zeros(shape[:2], dtype=torch.int32)  # (S, K)
        shuffle, first = torch.Generator(), 0  # position of the first sample in the joint tensors
        for length, group in groupby(range(len(samples)), key=lambda k: len(samples[k])):
            alike = list(group)
            passes = math.ceil(self._num_steps[alike[0]] / math.ceil(length / config.batch_size))
            orders = _orders(length, [seeds[k] for k in alike], passes, shuffle)
            self._deal(slice(alike[0], alike[-1] + 1), first, orders, config.batch_size)
            first += length * len(alike)

    def __iter__(self) -> Iterator[Step]:
        for s, (indices, counts) in enumerate(zip(self._indices, self._counts, strict=True)):
            num_active = sum(1 for steps in self._num_steps if steps > s)
            yield self._step(indices[:num_active], counts[:num_active])

    def _deal(self, clients: slice, first: int, orders: torch.Tensor, batch_size: int) -> None:
        """Write the batches of clients with equal numbers of samples; `orders` is (clients, epochs, samples).

        The last epoch may be cut short.
        """
        import torch

        num_clients, epochs, length = orders.shape
        per_epoch, width = math.ceil(length / batch_size), self._indices.shape[2]
        num_steps = self._num_steps[clients.start]
        firsts = first + length * torch.arange(num_clients, dtype=torch.int32)[:, None, None]
        filled = firsts.repeat(1, epochs, per_epoch * width)
        filled[:, :, :length] += orders
        self._indices[:num_steps, clients] = filled.view(num_clients, -1, width).transpose(0, 1)[:num_steps]
        counts = torch.tensor([min(batch_size, length - start) for start in range(0, length, batch_size)])
        self._counts[:num_steps, clients] = counts.int().repeat(epochs)[:num_steps, None]

    def _step(self, indices: torch.Tensor, counts: torch.Tensor) -> Step:
        import torch

        device, widest = self._samples.device, int(counts.max())
        chosen = indices[:, :widest].long().to(device)
        ragged = bool((counts < widest).any())
        mask = (torch.arange(widest) < counts[:, None]).to(device) if ragged else None
        batch = self._samples.chosen(chosen)
        return Step(batch.inputs, batch.targets, mask, counts.to(device))


def joined(samples: Sequence[Samples]) -> Samples:
    """Return the samples of several sets of one kind, one after another."""
    import torch

    inputs, targets = ([one.inputs for one in samples], [one.targets for one in samples])
    return Samples(*(mapped(lambda *parts: torch.cat(parts), first, *others) for first, *others in (inputs, targets)))


def _orders(length: int, seeds: Sequence[int], epochs: int, shuffle: torch.Generator) -> torch.Tensor:
    """Return the shuffles that `train_epochs` draws for these seeds, (seeds, epochs, length)."""
    import torch

    orders = []
    for seed in seeds:
        shuffle.manual_seed(seed)
        orders += [torch.randperm(length, generator=shuffle) for _ in range(epochs)]
    return torch.stack(orders).int().view(len(seeds), epochs, length)
