"""A round of training in parts, in the trainer: the device's layers on its raw data, the rest in the cloud."""

from __future__ import annotations

from pathlib import Path

from edge_agent.training.split.cached import CachedLoop
from edge_agent.training.split.link import SocketLink
from edge_agent.training.split.loop import DeviceLoop, DeviceRun
from edge_agent.training.trainer_wire import FitRequest
from edgefl.errors import TaskError
from edgefl.offload.training.auxiliary import AuxiliaryLoss
from edgefl.offload.training.checkpoints import PartCheckpoints
from edgefl.offload.training.halves import DeviceHalf
from edgefl.offload.training.layout import layout_of
from edgefl.offload.training.model import PartedModel
from edgefl.offload.training.state import PartState
from edgefl.protocols.messages import MAX_SECONDS
from edgefl.protocols.split.messages import VERSION, BeginTraining
from edgefl.settings.split import AUXILIARY
from edgefl.task import FitResult, Task
from edgefl.training.adapters import loader_options, rank_of
from edgefl.training.local import batch_order, data_seed, derive_seed
from edgefl.training.samples import train_samples
from edgefl.trees import Tree
from edgefl.trees.frozen import whole


def train_in_parts(task: Task, parameters: Tree, fit: FitRequest, frozen: Tree | None, state: Tree | None) -> FitResult:
    """Train the device's part with the cloud's; return the device's update.

    Raises TaskError if the cloud refuses, or cannot be reached for too long.
    """
    import torch

    config, split = fit.train, fit.train.split
    if not fit.split_socket:
        raise TaskError(
            f"task {task.name!r}: this agent gives the trainer no way to the cloud's part; update the agent"
        )
    rank, options = rank_of(task.name, config, fit.options, fit.client), loader_options(fit.options)
    model = PartedModel(task=task, config=config, rank=rank)
    samples = train_samples(task, options, seed=data_seed(config.seed, fit.client), workers=config.workers)
    seed = derive_seed(config.seed, fit.round, fit.client)
    order = list(batch_order(torch.nn.Module(), samples, config, seed))
    first = -(-len(order[0]) // split.micro_batches)
    layout = layout_of(samples.first(min(first, len(samples))).inputs)
    parts, tensors = model.parts(layout), whole(parameters, frozen)

    def fresh() -> PartState:
        return model.device_state(parts, tensors, state)

    half, auxiliary = DeviceHalf(task, fresh(), seed), None
    if split.gradients == AUXILIARY:
        auxiliary = AuxiliaryLoss(task, config, state)
    path = Path(fit.split_socket)
    run = DeviceRun(
        half=half,
        make_parts=lambda inputs: model.parts(layout_of(inputs)),
        samples=samples,
        order=order,
        config=config,
        seed=seed,
        connect=lambda: SocketLink(path, split.answer_s),
        checkpoints=PartCheckpoints(Path(fit.split_kept), is_only=True),
        fresh=fresh,
        auxiliary=auxiliary,
        begin=BeginTraining(
            version=VERSION, job=fit.job, round=fit.round, bundle=Path(fit.bundle).stem, samples=len(samples),
            steps=len(order), inputs=layout, rank=rank or 0,
            remaining_s=min(fit.deadline_s or MAX_SECONDS, MAX_SECONDS),
        ),
    )  # fmt: skip
    loop = CachedLoop(run) if split.sends_once else DeviceLoop(run)
    loss = loop.train()
    moved = half.state.moving()
    tree = model.update(moved, parameters)
    kept = {**(half.state.kept() if config.keep_optimizer_state else {}), **(auxiliary.state() if auxiliary else {})}
    metrics = {
        "train_loss": loss,
        "train_cut_up_bytes": float(loop.bytes_up),
        "train_cut_down_bytes": float(loop.bytes_down),
    }
    return FitResult(tree=tree, weight=float(len(samples)), metrics=metrics, state=kept)
