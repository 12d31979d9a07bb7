"""Train for a round with several processes: the update of one process, with its work divided.

Each process loads the same samples and draws the same batches; of every batch it takes its part, and the gradients
are averaged (`SharedGradient`), so that all take the same step. With 8 processes a batch of 32 is 8 times 4 samples.
Random numbers of the user's code (dropout, augmentation) differ between the processes; batch norm uses the samples of
its own process, and the buffers of the first process are kept.
Invariant: without dropout, batch norm and random reading, the update is that of `train_locally`, up to rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgefl.config import TrainConfig
from edgefl.errors import TaskError
from edgefl.task import FitResult, Task, UserCode
from edgefl.training.adapters import adapters_of, refuse_settings
from edgefl.training.broadcast import MAX_SAMPLES, refuse_broadcast
from edgefl.training.local import batch_order, batches_of, data_seed, derive_seed, has_batch_norm, make_model
from edgefl.training.own_fit import fit_of
from edgefl.training.parallel.gradients import SharedGradient, full, tensors_of
from edgefl.training.parallel.workers import TrainingGroup
from edgefl.training.randomness import seeded
from edgefl.training.samples import SampleSet, computing_device, train_samples
from edgefl.training.steps.client_state import RoundStart, begin_from, model_state
from edgefl.training.steps.descent import Descent
from edgefl.training.steps.layout import has_channels_last, lay_out
from edgefl.training.structures import leaves
from edgefl.trees import Array, Tree, subtract
from edgefl.trees.frozen import refuse_moved, refuse_other_parts, whole
from edgefl.trees.tensors import array_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """What a process has loaded for a round."""

    task: Task
    parameters: Tree  # those that change
    frozen: Tree | None = None
    state: Tree | None = None  # what the client kept after its former training


Load = Callable[[], Loaded]


@dataclass(frozen=True, kw_only=True, slots=True)
class Assigned:
    """What one client trains in a round."""

    config: TrainConfig
    options: Mapping[str, str]
    round: int
    client: str

    @property
    def seed(self) -> int:
        return derive_seed(self.config.seed, self.round, self.client)


def train_together(workers: TrainingGroup, load: Load, assigned: Assigned) -> FitResult:
    """Train this process's part; the leader returns the update, all others one without tensors.

    Raises TaskError: before the training, all processes do; later, this one alone, and the others wait for it (see
    `TrainingGroup.raise_alarm`).
    """
    loaded, config = _agreed_task(workers, load), assigned.config
    task, parameters, frozen = loaded.task, loaded.parameters, loaded.frozen
    if task.fit is not None:
        return _fit(workers, task, parameters, assigned, frozen)
    begun, model, samples = _agreed_model(workers, loaded, assigned)
    gradient = _agreed_gradient(workers, task, model, samples, config)
    state: dict[str, Array] = {}
    if config.algorithm == "fedsgd":
        loss = _accumulate(workers, task, model, samples, assigned, gradient)
        tree = _gradient_tree(workers, model, parameters)
    else:
        descent = Descent(task, gradient, loaded.state)
        loss = _descend(workers, task, samples, assigned, gradient, descent)
        if config.keep_optimizer_state:
            state |= descent.kept()  # of all processes together, if the model is sharded
        trained = _trained_tree(workers, task, model, begun.start, frozen)
        tree = {
            name: np.asarray(subtract(trained[name], np.asarray(old)))
            for name, old in begun.sent.items()
            if workers.leads
        }
        state |= model_state(begun, trained, config)
    if not workers.leads:
        return FitResult(tree={}, weight=float(len(samples)), metrics={"train_loss": loss})
    return FitResult(tree=tree, weight=float(len(samples)), metrics={"train_loss": loss}, state=state)


def _fit(workers: TrainingGroup, task: Task, parameters: Tree, assigned: Assigned, frozen: Tree | None) -> FitResult:
    """Call the task's `fit` in every process; the leader's result counts."""
    with workers.environment(), seeded(_own_seed(assigned.seed, workers.rank)):
        return fit_of(task, parameters, assigned.config, assigned.options, frozen)


def _agreed_task(workers: TrainingGroup, load: Load) -> Loaded:
    loaded, fault = None, None
    try:
        loaded = load()
    except TaskError as error:
        fault = error
    workers.agree({"kind of task": "" if loaded is None else "fit" if loaded.task.fit is not None else "model"}, fault)
    if loaded is None:
        raise AssertionError("agree raises the fault")
    return loaded


def _agreed_model(
    workers: TrainingGroup, loaded: Loaded, assigned: Assigned
) -> tuple[RoundStart, torch.nn.Module, SampleSet]:
    """Make the model, load the samples, and compare both with the other processes'."""
    fault, said, config, task, frozen = None, dict[str, Any](), assigned.config, loaded.task, loaded.frozen
    made: tuple[RoundStart, torch.nn.Module, SampleSet] | None = None
    try:
        workers.open(config.backend)
        begun = begin_from(loaded.parameters, loaded.state, config)
        sharded = config.strategy == "fsdp"  # one device may not hold the complete model
        model = make_model(task, whole(begun.start, frozen), device="cpu" if sharded else None)
        if frozen is not None:
            refuse_other_parts(task.name, model, frozen)
        refuse_settings(task.name, adapters_of(task.name, model), config)
        if not sharded and has_channels_last(model):
            lay_out(model)
        seed = data_seed(config.seed, assigned.client)
        samples = train_samples(task, assigned.options, seed=seed, workers=config.workers)
        said = {"model": _described(model), "number of samples": len(samples), "first sample": _digest(samples)}
        _refuse_idle(workers, task, samples, config)
        made = begun, model, samples
    except TaskError as error:
        fault = error
    workers.agree(said, fault)
    if made is None:
        raise AssertionError("agree raises the fault")
    return made


def _refuse_idle(workers: TrainingGroup, task: Task, samples: SampleSet, config: TrainConfig) -> None:
    if workers.size > min(len(samples), config.batch_size):
        raise TaskError(
            f"task {task.name!r}: {workers.size} processes share batches of {config.batch_size} of {len(samples)} "
            "samples, so some would have none. Lower train.processes, or raise train.batch_size"
        )


def _agreed_gradient(
    workers: TrainingGroup, task: Task, model: torch.nn.Module, samples: SampleSet, config: TrainConfig
) -> SharedGradient:
    import torch

    gradient, fault = None, None
    try:
        gradient = SharedGradient(task, model, strategy=config.strategy, size=workers.size)
        model.eval()  # what batch norm has counted is left alone
        few = samples.first(MAX_SAMPLES)
        with torch.no_grad(), seeded(0), UserCode(task.name, "local training"):
            if task.loss is not None:
                refuse_broadcast(task.name, task.loss, gradient.outputs(few.inputs), few.targets)
    except TaskError as error:
        fault = error
    workers.agree({}, fault)
    if gradient is None:
        raise AssertionError("agree raises the fault")
    return gradient


class BatchParts:
    """The part of each batch that is this process's."""

    def __init__(self, workers: TrainingGroup, model: torch.nn.Module) -> None:
        self._rank, self._size = workers.rank, workers.size
        self._least = 2 if has_batch_norm(model) else 1  # batch norm needs two samples
        self.counts: list[int] = []  # of the complete batches
        self.parts: list[float] = []  # of each, this process's

    def of(self, batches: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield positions: this process's part of each batch; the first samples where it has no part, for shape."""
        import torch

        for batch in batches:
            number = min(self._size, max(1, len(batch) // self._least))
            part = torch.tensor_split(batch, number)[self._rank] if self._rank < number else batch[: self._least]
            self.counts.append(len(batch))
            self.parts.append(len(part) / len(batch) if self._rank < number else 0.0)
            yield part


def _descend(
    workers: TrainingGroup, task: Task, samples: SampleSet, assigned: Assigned, gradient: SharedGradient,
    descent: Descent,
) -> float:  # fmt: skip
    """Take all steps; returns the mean loss over all samples seen by all processes."""
    import torch

    model = gradient.model
    shares, losses, config = BatchParts(workers, model), list[torch.Tensor](), assigned.config
    own = _own_seed(assigned.seed, workers.rank)
    model.train()
    with seeded(own), UserCode(task.name, "local training"):
        descent.begin(config)
        order = shares.of(batch_order(model, samples, config, assigned.seed))
        for number, batch in enumerate(samples.batches(order, own)):
            gradient.share = shares.parts[number]
            losses.append(descent.take(batch.inputs, batch.targets))
    counts = torch.tensor(shares.counts, dtype=torch.float64, device=losses[0].device)
    return _summed(torch.dot(torch.stack(losses).double(), counts)) / sum(shares.counts)


def _accumulate(
    workers: TrainingGroup, task: Task, model: torch.nn.Module, samples: SampleSet, assigned: Assigned,
    gradient: SharedGradient,
) -> float:  # fmt: skip
    """Compute the gradient of the mean loss over all samples into the model; returns that loss."""
    import torch

    shares, own = BatchParts(workers, model), _own_seed(assigned.seed, workers.rank)
    order = torch.arange(len(samples), device=samples.device)
    total = torch.zeros((), dtype=torch.float64, device=computing_device())
    model.train()
    model.zero_grad()
    with seeded(own), UserCode(task.name, "local training"):
        batches = shares.of(batches_of(order, assigned.config.batch_size, model))
        for number, batch in enumerate(samples.batches(batches, own)):
            gradient.share = shares.parts[number] * shares.counts[number] / len(samples)
            total += gradient.accumulate(batch.inputs, batch.targets)
        gradient.sum_up()
    return _summed(total)


def _summed(number: torch.Tensor) -> float:
    import torch.distributed as dist

    dist.all_reduce(number)
    return float(number)


def _trained_tree(
    workers: TrainingGroup, task: Task, model: torch.nn.Module, parameters: Tree, frozen: Tree | None
) -> dict[str, Array]:
    """Return the trained tensors, in the order of the parameters; only the leader keeps them."""
    trained, still = dict[str, Array](), frozen or {}
    _share_buffers(model)
    for name, tensor in tensors_of(model):
        if workers.leads and name in parameters:
            trained[name] = np.array(array_of(tensor), order="C")
        elif workers.leads and name in still:
            refuse_moved(task.name, {name: array_of(tensor)}, {name: still[name]})
    return {name: trained[name] for name in parameters} if workers.leads else {}


def _gradient_tree(workers: TrainingGroup, model: torch.nn.Module, parameters: Tree) -> dict[str, Array]:
    """Return the gradients, zeros for those that are missing; buffers as deltas."""
    _share_buffers(model)
    tree = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        grad = full(parameter.grad)
        if workers.leads and name in parameters:
            zeros = np.zeros_like(np.asarray(parameters[name]))
            tree[name] = zeros if grad is None else np.array(array_of(grad), order="C")
    if not workers.leads:
        return {}
    for name, tensor in model.state_dict().items():
        if name in parameters and name not in tree:
            tree[name] = np.asarray(subtract(np.array(array_of(tensor)), np.asarray(parameters[name])))
    return {name: tree[name] for name in parameters}


def _share_buffers(model: torch.nn.Module) -> None:
    import torch.distributed as dist

    for buffer in model.buffers():
        dist.broadcast(buffer, 0)


def _own_seed(seed: int, rank: int) -> int:
    """Return the seed of a process's random numbers: the first one's are those of a single process."""
    return seed if rank == 0 else derive_seed(seed, rank, "process")


def _described(model: torch.nn.Module) -> dict[str, str]:
    """Return each tensor of a model as text, to be compared with other processes'."""
    trained = {name for name, one in model.named_parameters(remove_duplicate=False) if one.requires_grad}
    return {
        name: f"{one.dtype}{list(one.shape)}{' trained' if name in trained else ''}"
        for name, one in model.state_dict().items()
    }


def _digest(samples: SampleSet) -> str:
    """Return a hash of the first sample."""
    first, found = samples.first(1), hashlib.sha256()
    for leaf in [*leaves(first.inputs), *leaves(first.targets)]:
        array = array_of(leaf) if hasattr(leaf, "dtype") else np.zeros(0)
        found.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:12]
