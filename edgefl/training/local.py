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
from collections.abc import Collection, Iterator, Mapping
from itertools import count, islice
from typing import TYPE_CHECKING

import numpy as np

from edgefl.config import TrainConfig
from edgefl.errors import TaskError
from edgefl.guards import wrong_spec
from edgefl.task import FitResult, Task, UserCode
from edgefl.training.adapters import adapters_of, loader_options, rank_of, refuse_settings, restart, with_factors
from edgefl.training.adapters.layers import nothing, put
from edgefl.training.broadcast import MAX_SAMPLES, refuse_broadcast
from edgefl.training.own_fit import arrays_of, fit_of, matrices_of
from edgefl.training.randomness import seeded
from edgefl.training.samples import SampleSet, computing_device, require_torch, train_samples
from edgefl.training.steps.client_state import begin_from, model_state
from edgefl.training.steps.descent import Autograd, Descent, loss_of
from edgefl.training.steps.layout import has_channels_last, laid_out, lay_out
from edgefl.training.structures import call
from edgefl.trees import Array, EncodedTree, Tree, in_form, spec_of, subtract, why_not_sent
from edgefl.trees.factors import is_low_rank
from edgefl.trees.frozen import refuse_moved, refuse_other_parts, whole
from edgefl.trees.narrow import narrow_name
from edgefl.trees.tensors import array_of, tensor_of

if TYPE_CHECKING:
    import torch


def initial_parameters(task: Task, seed: int = 0) -> Tree:
    """Return the parameters of round 1: the model's state dict, or the result of the task's `initial`.

    Instead of trained adapters, it has the matrices that they add to the base's weights, which are zero.
    """
    if task.initial is not None:
        with seeded(seed), UserCode(task.name, "initial"):
            tree = task.initial()
        return matrices_of(task, "initial", arrays_of(task, "initial", tree))
    model = make_model(task, seed=seed)
    tensors, adapters = tree_of(task, model), adapters_of(task.name, model)
    if odd := next((one for one in tensors if is_low_rank(one) or narrow_name(one) is not None), ""):
        raise TaskError(f"task {task.name!r}: its model's {odd!r} has a name that is for another form; rename it")
    return EncodedTree({**tensors, **nothing(adapters)}) if adapters else tensors


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
    frozen: Tree | None = None, state: Tree | None = None,
) -> FitResult:  # fmt: skip
    """Train on this device's samples; raises TaskError for every error of the user's code.

    `parameters` are the tensors that change, and that the result has, or with fragments those that were received;
    `frozen` are the model's other tensors, if known; `state` is what this client kept after its former training
    (`FitResult.state`), if it has any.
    """
    if task.fit is not None:
        with seeded(derive_seed(config.seed, round, client)):
            return fit_of(task, parameters, config, options, frozen)
    rank, options = rank_of(task.name, config, options, client), loader_options(options)
    begun = begin_from(parameters, state, config)
    model = make_model(task, whole(begun.start, frozen), rank=rank)
    if frozen is not None:
        refuse_other_parts(task.name, model, frozen)
    adapters = adapters_of(task.name, model)
    refuse_settings(task.name, adapters, config)
    restart(model, adapters, adapter_seed(config.seed, round))
    if has_channels_last(model):
        lay_out(model)
    samples = train_samples(task, options, seed=data_seed(config.seed, client), workers=config.workers)
    seed = derive_seed(config.seed, round, client)
    _refuse_broadcast(task, model, samples)
    descent = Descent(task, Autograd(task, model), state)
    if config.algorithm == "fedsgd":
        loss = accumulate_gradient(task, model, samples, batch_size=config.batch_size, seed=seed)
        tree = gradient_of(task, model, parameters)
    else:
        model.train()
        loss = train_epochs(task, model, samples, config, seed, descent)
        tree = delta_of(task, model, begun.sent)
    if frozen:
        still = {name: frozen[name] for name in frozen.keys() - {one.weight for one in adapters}}
        refuse_moved(task.name, views_of(task, model, still), still)
    kept = dict(descent.kept()) if config.keep_optimizer_state else {}
    if config.fragments > 1:
        kept |= model_state(begun, tree_of(task, model, begun.start), config)
    return FitResult(tree=tree, weight=float(len(samples)), metrics={"train_loss": loss}, state=kept)


def _refuse_broadcast(task: Task, model: torch.nn.Module, samples: SampleSet) -> None:
    import torch

    model.eval()  # what batch norm has counted is left alone
    few = samples.first(MAX_SAMPLES)
    with torch.no_grad(), seeded(0), UserCode(task.name, "local training"):
        if task.loss is not None:
            refuse_broadcast(task.name, task.loss, call(model, few.inputs), few.targets)


def as_sent(update: Tree, config: TrainConfig, round: int, client: str) -> Tree:  # noqa: A002 - the word of Plan
    """Return a client's update in the form in which it is sent (`train.wire`)."""
    return in_form(update, config.wire, derive_seed(config.seed, round, f"{client}/wire"))


def derive_seed(seed: int, round_number: int, client: str) -> int:
    """Return the seed of one local training: the same in every process, unlike Python's hash()."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{round_number}/{client}".encode()).digest()[:7])


def adapter_seed(seed: int, round_number: int) -> int:
    """Return the seed of a round's new adapters: all clients with adapters of one rank begin with the same."""
    return derive_seed(seed, round_number, "/adapters")  # no client has this name


def data_seed(seed: int, client: str) -> int:
    """Return the seed of a client's loader: its samples are the same in every round."""
    return derive_seed(seed, 0, client)


def make_model(
    task: Task, parameters: Tree | None = None, *, seed: int = 0, device: str | None = None, rank: int | None = None
) -> torch.nn.Module:
    """Create the task's model on a device, else on the computing device, with these parameters if given.

    `rank` is that of its adapters, None = the task's own.
    """
    require_torch(f"task {task.name!r}")
    import torch

    if task.model is None:
        raise TaskError(f"task {task.name!r} has no model: it has its own fit")
    with seeded(seed), UserCode(task.name, "model"):
        model = task.model() if rank is None else task.model_of_rank(rank)
    if not isinstance(model, torch.nn.Module):
        raise TaskError(f"task {task.name!r}: model returned a {type(model).__name__}, not a torch.nn.Module")
    if parameters is not None:
        set_parameters(task, model, parameters)
    return model.to(device or computing_device())


def set_parameters(task: Task, model: torch.nn.Module, parameters: Tree) -> None:
    """Copy a tree into a model; raises TaskError if it does not match the model."""
    import torch

    adapters = adapters_of(task.name, model)
    wanted = spec_of(views_of(task, model)) | {one.matrix: one.spec for one in adapters}
    if fault := wrong_spec(spec_of(parameters), wanted):
        raise TaskError(f"task {task.name!r}: these are not the parameters of its model: {fault}")
    moved, own = {one.weight: one for one in adapters}, {name for one in adapters for name in one.factor_names}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in own:
                continue
            if name in moved:
                put(moved[name], tensor, parameters)
                continue
            tensor.copy_(tensor_of(np.array(parameters[name])))


def tree_of(task: Task, model: torch.nn.Module, names: Collection[str] | None = None) -> dict[str, Array]:
    """Return a copy of the model's state dict, or of a part; raises TaskError for a dtype that numpy does not have."""
    return {name: np.array(view, order="C") for name, view in views_of(task, model, names).items()}


def views_of(task: Task, model: torch.nn.Module, names: Collection[str] | None = None) -> dict[str, Array]:
    """Return `tree_of` without a copy, except for tensors on a GPU."""
    state = model.state_dict()
    own = {name for one in adapters_of(task.name, model) for name in one.factor_names} if names is None else ()
    chosen = {name: state[name] for name in (state if names is None else names) if name not in own}
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
    """Return the model's state dict minus the parameters it started from, in their order; adapters as factors."""
    adapters = adapters_of(task.name, model)
    matrices = {one.matrix for one in adapters}
    new = tree_of(task, model, [name for name in parameters if name not in matrices])
    moved = {name: np.asarray(subtract(one, np.asarray(parameters[name]))) for name, one in new.items()}
    return with_factors(adapters, moved)


def gradient_of(task: Task, model: torch.nn.Module, parameters: Tree) -> Tree:
    """Return the model's gradients, zeros for those that are missing; buffers as deltas."""
    tree = dict(delta_of(task, model, parameters))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in tree:
            grad = parameter.grad
            tree[name] = np.zeros_like(tree[name]) if grad is None else np.array(array_of(grad), order="C")
    return tree


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
