"""A client's work in a round: local training on its own samples, and the update that it sends back.

FedAvg (McMahan et al. 2017, Algorithm 1, ClientUpdate): local epochs or steps of minibatch SGD; sends new - old.
FedProx (Li et al. 2020): the same with mu/2 * ||w - w0||^2 added to the loss.
FedSGD (McMahan et al. 2017, section 2): one gradient of the mean loss over all local samples, exact,
accumulated in chunks. Buffers have no gradient: they send their delta.
Invariant: a result depends only on (parameters, samples, config, round, client): the global random states
(Python's, numpy's, torch's) are seeded from these for the user's code, and restored afterwards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import count, islice
from typing import TYPE_CHECKING, Protocol

import numpy as np

from edgefl.config import TrainConfig
from edgefl.errors import TaskError
from edgefl.guards import wrong_spec
from edgefl.task import FitResult, Task, UserCode
from edgefl.training.broadcast import MAX_SAMPLES, refuse_broadcast
from edgefl.training.own_fit import arrays_of, fit_of
from edgefl.training.randomness import seeded
from edgefl.training.samples import SampleSet, computing_device, require_torch, train_samples
from edgefl.training.structures import Structure, call, mapped
from edgefl.trees import Array, Tree, spec_of, subtract, why_not_sent
from edgefl.trees.frozen import refuse_moved, refuse_other_parts, whole
from edgefl.trees.tensors import array_of, tensor_of

if TYPE_CHECKING:
    import torch


def initial_parameters(task: Task, seed: int = 0) -> Tree:
    """Return the parameters of round 1: the model's state dict, or the result of the task's `initial`."""
    if task.initial is not None:
        with seeded(seed), UserCode(task.name, "initial"):
            tree = task.initial()
        return arrays_of(task, "initial", tree)
    return tree_of(task, make_model(task, seed=seed))


def buffer_names(task: Task) -> tuple[str, ...]:
    """Return the names in the state dict that are not parameters; none for a task with `fit`."""
    if task.model is None:
        return ()
    model = make_model(task)
    trained = dict(model.named_parameters(remove_duplicate=False))
    return tuple(name for name in model.state_dict() if name not in trained)


def set_threads(threads: int) -> None:
    """Set the number of torch threads in this process; small models are fastest with one."""
    require_torch("local training")
    import torch

    torch.set_num_threads(threads)


def train_locally(  # noqa: PLR0913 - what a plan asks, and of whom
    task: Task, parameters: Tree, config: TrainConfig, *,
    options: Mapping[str, str], round: int, client: str,  # noqa: A002 - the word of Plan and Update
    frozen: Tree | None = None,
) -> FitResult:  # fmt: skip
    """Train on this device's samples; raises TaskError for every error of the user's code.

    `parameters` are the tensors that change, and that the result has; `frozen` are the model's other tensors,
    if known.
    """
    if task.fit is not None:
        with seeded(derive_seed(config.seed, round, client)):
            return fit_of(task, parameters, config, options, frozen)
    model = make_model(task, whole(parameters, frozen))
    if frozen is not None:
        refuse_other_parts(task.name, model, frozen)
    if has_channels_last(model):
        lay_out(model)
    samples = train_samples(task, options, seed=data_seed(config.seed, client), workers=config.workers)
    seed = derive_seed(config.seed, round, client)
    _refuse_broadcast(task, model, samples)
    if config.algorithm == "fedsgd":
        loss = accumulate_gradient(task, model, samples, batch_size=config.batch_size, seed=seed)
        tree = gradient_of(task, model, parameters)
    else:
        model.train()
        loss = train_epochs(task, model, samples, config, seed, Descent(task, Autograd(task, model)))
        tree = delta_of(task, model, parameters)
    if frozen:
        refuse_moved(task.name, views_of(task, model, frozen), frozen)
    return FitResult(tree=tree, weight=float(len(samples)), metrics={"train_loss": loss})


def _refuse_broadcast(task: Task, model: torch.nn.Module, samples: SampleSet) -> None:
    import torch

    model.eval()  # what batch norm has counted is left alone
    few = samples.first(MAX_SAMPLES)
    with torch.no_grad(), seeded(0), UserCode(task.name, "local training"):
        if task.loss is not None:
            refuse_broadcast(task.name, task.loss, call(model, few.inputs), few.targets)


def derive_seed(seed: int, round_number: int, client: str) -> int:
    """Return the seed of one local training: the same in every process, unlike Python's hash()."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{round_number}/{client}".encode()).digest()[:7])


def data_seed(seed: int, client: str) -> int:
    """Return the seed of a client's loader: its samples are the same in every round."""
    return derive_seed(seed, 0, client)


def make_model(
    task: Task, parameters: Tree | None = None, *, seed: int = 0, device: str | None = None
) -> torch.nn.Module:
    """Create the task's model on a device, else on the computing device, with these parameters if given."""
    require_torch(f"task {task.name!r}")
    import torch

    if task.model is None:
        raise TaskError(f"task {task.name!r} has no model: it has its own fit")
    with seeded(seed), UserCode(task.name, "model"):
        model = task.model()
    if not isinstance(model, torch.nn.Module):
        raise TaskError(f"task {task.name!r}: model returned a {type(model).__name__}, not a torch.nn.Module")
    if parameters is not None:
        set_parameters(task, model, parameters)
    return model.to(device or computing_device())


def set_parameters(task: Task, model: torch.nn.Module, parameters: Tree) -> None:
    """Copy a tree into a model; raises TaskError if it does not match the model."""
    import torch

    if fault := wrong_spec(spec_of(parameters), spec_of(views_of(task, model))):
        raise TaskError(f"task {task.name!r}: these are not the parameters of its model: {fault}")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(tensor_of(np.array(parameters[name])))


def tree_of(task: Task, model: torch.nn.Module, names: Collection[str] | None = None) -> dict[str, Array]:
    """Return a copy of the model's state dict, or of a part; raises TaskError for a dtype that numpy does not have."""
    return {name: np.array(view, order="C") for name, view in views_of(task, model, names).items()}


def views_of(task: Task, model: torch.nn.Module, names: Collection[str] | None = None) -> dict[str, Array]:
    """Return `tree_of` without a copy, except for tensors on a GPU."""
    state = model.state_dict()
    chosen = state if names is None else {name: state[name] for name in names}
    return {name: _sendable(task, name, tensor) for name, tensor in chosen.items()}


def _sendable(task: Task, name: str, tensor: torch.Tensor) -> Array:
    """Return a tensor of the model as an array; raises TaskError if it cannot be sent."""
    try:
        array = array_of(tensor)
    except (TypeError, AttributeError, RuntimeError) as cause:
        seen = f"is a {type(tensor).__name__}" if not hasattr(tensor, "dtype") else f"is {tensor.dtype}"
        raise TaskError(
            f"task {task.name!r}: its model's {name!r} {seen} and cannot be sent: {cause}. Keep it as a dense tensor "
            "of a dtype that numpy has, or out of the state dict (register_buffer(.., persistent=False))"
        ) from cause
    if why := why_not_sent(array.dtype):
        raise TaskError(f"task {task.name!r}: its model's {name!r} is {array.dtype}{list(array.shape)}: {why}")
    return array


def delta_of(task: Task, model: torch.nn.Module, parameters: Tree) -> Tree:
    """Return the model's state dict minus the parameters it started from, in their order."""
    new = tree_of(task, model, parameters)
    return {name: np.asarray(subtract(new[name], np.asarray(old))) for name, old in parameters.items()}


def gradient_of(task: Task, model: torch.nn.Module, parameters: Tree) -> Tree:
    """Return the model's gradients, zeros for those that are missing; buffers as deltas."""
    tree = dict(delta_of(task, model, parameters))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in tree:
            grad = parameter.grad
            tree[name] = np.zeros_like(tree[name]) if grad is None else np.array(array_of(grad), order="C")
    return tree


class BatchGradient(Protocol):
    """How a batch's gradients are computed."""

    @property
    def trained(self) -> Sequence[torch.nn.Parameter]:
        """The parameters that are trained."""

    def __call__(self, inputs: Structure, targets: Structure) -> tuple[Sequence[torch.Tensor | None], torch.Tensor]:
        """Return the gradients of `trained` (None if the loss does not depend on a parameter), and the loss, 0-d."""


class Autograd:
    """Gradients by torch's autograd."""

    def __init__(self, task: Task, model: torch.nn.Module) -> None:
        self._task, self._model, self._channels_last = task, model, has_channels_last(model)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def __call__(self, inputs: Structure, targets: Structure) -> tuple[Sequence[torch.Tensor | None], torch.Tensor]:
        import torch

        outputs = call(self._model, laid_out(inputs) if self._channels_last else inputs)
        loss = loss_of(self._task, outputs, targets)
        return torch.autograd.grad(loss, self.trained, allow_unused=True), loss.detach()


class Descent:
    """Takes steps with a batch's gradients: by the task's optimizer, else w <- w - lr * g."""

    def __init__(self, task: Task, gradient: BatchGradient) -> None:
        self._task, self._gradient = task, gradient

    def begin(self, config: TrainConfig) -> None:
        """Start a client's training from the model's current parameters, with a new optimizer."""
        trained = self._gradient.trained
        self._mu = config.proximal_mu
        self._anchors = [parameter.detach().clone() for parameter in trained] if self._mu else []
        self._step = _optimizer_step(self._task, trained, config)

    def take(self, inputs: Structure, targets: Structure) -> torch.Tensor:
        """Take a step in place; returns the batch's loss before it, 0-d."""
        gradients, loss = self._gradient(inputs, targets)
        self._step(_pulled(gradients, self._gradient.trained, self._anchors, self._mu) if self._mu else gradients)
        return loss


def train_epochs(
    task: Task, model: torch.nn.Module, samples: SampleSet, config: TrainConfig, seed: int, descent: Descent
) -> float:
    """Train in place for `config.epochs` or `config.steps`; returns the mean loss over all samples seen.

    The model is in training mode, and `descent` belongs to it.
    """
    import torch

    losses, counts = [], []
    with seeded(seed), UserCode(task.name, "local training"):
        descent.begin(config)
        for batch in samples.batches(batch_order(model, samples, config, seed), seed):
            losses.append(descent.take(batch.inputs, batch.targets))
            counts.append(len(batch))
    return float(np.dot(torch.stack(losses).double().cpu().numpy(), counts)) / sum(counts)


def batch_order(model: torch.nn.Module, samples: SampleSet, config: TrainConfig, seed: int) -> Iterator[torch.Tensor]:
    """Yield the positions of each step's samples, (B,): every pass over the samples is a new shuffle of them."""
    import torch

    shuffle = torch.Generator().manual_seed(seed)
    passes = range(config.epochs) if config.epochs else count()
    orders = (torch.randperm(len(samples), generator=shuffle).to(samples.device) for _ in passes)
    order = (chosen for one in orders for chosen in batches_of(one, config.batch_size, model))
    return islice(order, config.steps) if config.steps else order


def accumulate_gradient(task: Task, model: torch.nn.Module, samples: SampleSet, *, batch_size: int, seed: int) -> float:
    """Compute the gradient of the mean loss over all samples into the model; returns that loss.

    Exact for any chunk size, except with batch norm, whose statistics are computed per chunk.
    """
    import torch

    total, order, last = 0.0, torch.arange(len(samples), device=samples.device), has_channels_last(model)
    model.train()
    model.zero_grad()
    with seeded(seed), UserCode(task.name, "local training"):
        for batch in samples.batches(batches_of(order, batch_size, model), seed):
            share = len(batch) / len(samples)  # the loss is a mean over its chunk
            inputs = laid_out(batch.inputs) if last else batch.inputs
            loss = loss_of(task, call(model, inputs), batch.targets) * share
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without types
            total += float(loss.detach())
    return total


def _optimizer_step(
    task: Task, trained: Sequence[torch.nn.Parameter], config: TrainConfig
) -> Callable[[Sequence[torch.Tensor | None]], None]:
    """Return a function that takes one step with the gradients of `trained`: the task's optimizer, else SGD.

    torch.optim.SGD does the same, but its import takes a second and it has more overhead.
    """
    import torch

    if task.optimizer is None:
        tensors, lr = [parameter.data for parameter in trained], config.lr

        def plain(gradients: Sequence[torch.Tensor | None]) -> None:
            moved = [(one, grad) for one, grad in zip(tensors, gradients, strict=True) if grad is not None]
            if moved:
                torch._foreach_add_(*map(list, zip(*moved, strict=True)), alpha=-lr)

        return plain
    optimizer = task.optimizer_of(trained, config)

    def chosen(gradients: Sequence[torch.Tensor | None]) -> None:
        for parameter, grad in zip(trained, gradients, strict=True):
            parameter.grad = grad
        optimizer.step()

    return chosen


def has_channels_last(model: torch.nn.Module) -> bool:
    """Whether a model trains with channels last: on a CPU this makes convolutions, and most of all pooling, faster."""
    import torch

    return not torch.cuda.is_available() and any(isinstance(one, torch.nn.Conv2d) for one in model.modules())


def lay_out(model: torch.nn.Module) -> None:
    """Store the kernels of a model's convolutions with channels last."""
    import torch

    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def laid_out(inputs: Structure) -> Structure:
    """Return the images (N, C, H, W) among the inputs with channels last; for one channel, this is the same memory."""
    return mapped(_laid_out, inputs)


def _laid_out(inputs: torch.Tensor) -> torch.Tensor:
    import torch

    if not isinstance(inputs, torch.Tensor) or inputs.dim() != 4:
        return inputs
    _, channels, height, width = inputs.shape
    if channels > 1:
        return inputs.contiguous(memory_format=torch.channels_last)
    return inputs.contiguous().as_strided(inputs.shape, (height * width, 1, width, 1))


def _pulled(
    gradients: Sequence[torch.Tensor | None], trained: Sequence[torch.nn.Parameter], anchors: Sequence[torch.Tensor],
    mu: float,
) -> list[torch.Tensor | None]:  # fmt: skip
    """Return the gradients plus the gradient of mu/2 * ||w - w0||^2."""
    terms = [mu * (parameter.detach() - anchor) for parameter, anchor in zip(trained, anchors, strict=True)]
    return [term if grad is None else grad + term for grad, term in zip(gradients, terms, strict=True)]


def batches_of(order: torch.Tensor, size: int, model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yield the order in batches. With batch norm, a single last sample joins the previous batch."""
    import torch

    batches = [order[start : start + size] for start in range(0, len(order), size)]
    if len(batches) > 1 and len(batches[-1]) == 1 and has_batch_norm(model):
        batches[-2:] = [torch.cat(batches[-2:])]
    yield from batches


def has_batch_norm(model: torch.nn.Module) -> bool:
    """Whether a model trains only with two samples or more."""
    import torch

    norms = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
    return any(isinstance(module, norms) for module in model.modules())


def loss_of(task: Task, outputs: Structure, targets: Structure) -> torch.Tensor:
    """Return the loss of a batch, 0-d; raises TaskError if it is not a single number."""
    import torch

    if task.loss is None:
        raise TaskError(f"task {task.name!r} has no loss")
    loss = task.loss(outputs, targets)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        seen = f"shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise TaskError(f"task {task.name!r}: loss returned {seen}; expected one number, the mean over the batch")
    return loss.reshape(())
