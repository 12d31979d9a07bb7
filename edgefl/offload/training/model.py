"""A task's model in the parts of a job's settings, for inputs of any layout that comes.

A decoder of transformers is made without weights and cut by its blocks: so a device has memory for its part alone.
Any other module is made whole and traced for each layout of inputs; both sides trace the same code, so their parts fit.
With a frozen device part, the first part runs as in evaluation, and none of its tensors is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from edgefl.config import TrainConfig
from edgefl.errors import ConfigError, ProtocolError, TaskError
from edgefl.offload.training.bare import without_weights
from edgefl.offload.training.decoder import decoder_parts, is_decoder
from edgefl.offload.training.layout import example_of, layout_of
from edgefl.offload.training.parts import DEVICE, ModelParts, refuse_batch_norm, refuse_shared
from edgefl.offload.training.state import PartState
from edgefl.offload.training.traced import one_name_each, traced_parts
from edgefl.offload.training.trial import check_parts
from edgefl.settings.split import FROZEN, SHARED
from edgefl.task import Task, UserCode
from edgefl.training.local import make_model
from edgefl.training.samples import test_samples as held_out_samples
from edgefl.training.samples import train_samples
from edgefl.trees import Tree

MAX_LAYOUTS = 16  # of inputs, in one job: each is a trace


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitTrees:
    """A job's tensors by who has them, all names of each."""

    moving: Tree  # that devices train or count, and send
    on_device: Tree  # frozen, on devices
    in_cloud: Tree  # all others
    buffers: tuple[str, ...]  # among the moving ones


@dataclass(kw_only=True, eq=False)
class PartedModel:
    """The parts of a task's model."""

    task: Task
    config: TrainConfig
    _known: dict[str, ModelParts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make the structure; raises ConfigError, and TaskError for the user's code."""
        if self.task.model is None:
            raise ConfigError(f"task {self.task.name!r} has its own fit; train.mode='split' needs a model and a loss")
        with without_weights(), UserCode(self.task.name, "model"):
            model = self.task.model()
        self._is_decoder = is_decoder(model)
        self._model: Any = model if self._is_decoder else make_model(self.task, device="cpu")
        self.names = one_name_each(self._model)
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        self._trained = frozenset(self.names[name] for name, one in parameters.items() if one.requires_grad)
        self._buffers = frozenset(name for name in self.names if name not in parameters)
        refuse_batch_norm(self._model, self.config.split.micro_batches)

    @property
    def trained(self) -> frozenset[str]:
        """The names of what requires a gradient, one for each tensor."""
        return self._trained

    @property
    def is_frozen(self) -> bool:
        """Whether the device's first part is not trained."""
        return self.config.split.device_part == FROZEN

    def parts(self, layout: str) -> ModelParts:
        """Return the parts for inputs of this layout; raises ConfigError for a cut that the model does not have."""
        key = "" if self._is_decoder else layout
        if key not in self._known:
            if len(self._known) >= MAX_LAYOUTS:
                raise ProtocolError(
                    f"inputs of more than {MAX_LAYOUTS} shapes in one job: each shape is traced. Pad them to one length"
                )
            parts = self._made(layout)
            refuse_shared(parts, self._trained - self._frozen_names(parts), self.task.name)
            self._known[key] = parts
        return self._known[key]

    def _made(self, layout: str) -> ModelParts:
        split = self.config.split
        if self._is_decoder:
            return decoder_parts(self._model, split.cut, split.last_cut, frozen=self.is_frozen)
        return traced_parts(self._model, example_of(layout), split.cut, split.last_cut, frozen=self.is_frozen)

    def _frozen_names(self, parts: ModelParts) -> frozenset[str]:
        return frozenset(parts.parts[DEVICE].tensors) if self.is_frozen else frozenset()

    def device_state(self, parts: ModelParts, tensors: Tree, before: Tree | None = None) -> PartState:
        """Return the device's tensors, from at least these."""
        return self._state(parts.of_device(), self._frozen_names(parts), tensors, self.config, before)

    def cloud_state(self, layout: str, tensors: Tree, config: TrainConfig) -> PartState:
        """Return the cloud's tensors, from at least these."""
        return self._state(self.parts(layout).of_cloud(), frozenset(), tensors, config, None)

    def _state(
        self, names: list[str], frozen: frozenset[str], tensors: Tree, config: TrainConfig, before: Tree | None
    ) -> PartState:  # fmt: skip
        if config.split.cloud_part == SHARED and config.proximal_mu:
            raise ConfigError("train.proximal_mu pulls to a round's beginning, and a shared part has none; set it to 0")
        return PartState(
            self.task, names, tensors, trained=self._trained - frozen, buffers=self._buffers - frozen, config=config,
            before=before,
        )  # fmt: skip

    def divided(self, parts: ModelParts, tensors: Tree) -> SplitTrees:
        """Return a job's tensors by who has them."""
        here, frozen = set(parts.of_device()), self._frozen_names(parts)
        moves = (self._trained | self._buffers) & here - frozen
        there = {name for name in self.names if self.names[name] not in here}
        moving = {name: one for name, one in tensors.items() if self.names[name] in moves}
        return SplitTrees(
            moving=moving,
            on_device={name: one for name, one in tensors.items() if name not in moving and name not in there},
            in_cloud={name: one for name, one in tensors.items() if name in there},
            buffers=tuple(name for name in moving if name in self._buffers),
        )

    def moving_in_cloud(self, parts: ModelParts) -> frozenset[str]:
        """Return the names of what the cloud trains or counts."""
        return frozenset(parts.of_cloud()) & (self._trained | self._buffers)


def tried_parts(task: Task, config: TrainConfig, tensors: Tree) -> tuple[PartedModel, ModelParts]:
    """Return a task's parts, after a step in parts gave the whole model's gradients.

    On the operator's machine, with a few of the task's own samples. Raises ConfigError for cuts that cannot be used,
    ParityError for parts that compute something else, TaskError if nothing is trained in the cloud.
    """
    model = PartedModel(task=task, config=config)
    samples = held_out_samples(task, {}) if task.test_data is not None else train_samples(task, {}, seed=config.seed)
    few = samples.first(4)
    parts = model.parts(layout_of(few.inputs))
    if not model.moving_in_cloud(parts) & model.trained:
        raise TaskError(
            f"task {task.name!r} trains nothing behind the cut {config.split.cut!r}; train it without a split"
        )
    if not model.is_frozen:
        check_parts(task, make_model(task, tensors, device="cpu"), parts, few.inputs, few.targets)
    return model, parts
