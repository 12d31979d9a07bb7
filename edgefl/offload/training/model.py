"""A task's model in the parts of a job's settings, for inputs of any layout that comes.

A decoder of transformers is made without weights and cut by its blocks: so a device has memory for its part alone.
Any other module is made whole and traced for each layout of inputs; both sides trace the same code, so their parts fit.
With a frozen device part, the first part runs as in evaluation, and none of its tensors is trained.
Of a model that peft has wrapped, the parts are those of the model inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from edgefl.config import TrainConfig
from edgefl.errors import ConfigError, ProtocolError, TaskError
from edgefl.offload.training.adapted import PartedAdapters
from edgefl.offload.training.bare import without_weights
from edgefl.offload.training.decoder import decoder_parts, is_decoder
from edgefl.offload.training.layout import example_of, layout_of
from edgefl.offload.training.parts import DEVICE, ModelParts, refuse_batch_norm, refuse_shared
from edgefl.offload.training.state import PartState
from edgefl.offload.training.traced import one_name_each, traced_parts
from edgefl.offload.training.trial import check_parts
from edgefl.settings.split import FROZEN, SHARED
from edgefl.task import Task, UserCode
from edgefl.training.adapters import adapters_of, refuse_settings
from edgefl.training.adapters.layers import unwrapped
from edgefl.training.local import make_model
from edgefl.training.samples import test_samples as held_out_samples
from edgefl.training.samples import train_samples
from edgefl.trees import Array, Tree, subtract
from edgefl.trees.factors import is_low_rank
from edgefl.trees.views import renamed

MAX_LAYOUTS = 16  # of inputs, in one job: each is a trace
MAX_RANKS = 8  # of adapters, in one job: each is a model


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
    rank: int | None = None  # of its adapters; None = the task's own
    _known: dict[str, ModelParts] = field(default_factory=dict)
    _by_rank: dict[int, PartedModel] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make the structure; raises ConfigError, and TaskError for the user's code."""
        if self.task.model is None:
            raise ConfigError(f"task {self.task.name!r} has its own fit; train.mode='split' needs a model and a loss")
        with without_weights(), UserCode(self.task.name, "model"):
            model = self.task.model() if self.rank is None else self.task.model_of_rank(self.rank)
        self._is_decoder = is_decoder(unwrapped(model))
        if not self._is_decoder:
            model = make_model(self.task, device="cpu", rank=self.rank)
        self._model = unwrapped(model)
        self.adapters = PartedAdapters(task=self.task.name, model=model, adapters=adapters_of(self.task.name, model))
        refuse_settings(self.task.name, self.adapters.adapters, self.config)
        self.names, self._inner = one_name_each(model), one_name_each(self._model, model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._trained = frozenset(self.names[name] for name, one in parameters.items() if one.requires_grad)
        self._buffers = frozenset(name for name in self.names if name not in parameters)
        refuse_batch_norm(self._model, self.config.split.micro_batches)

    def of_rank(self, rank: int) -> PartedModel:
        """Return the model with adapters of this rank, 0 = the task's; raises ProtocolError for one rank too many."""
        if not rank:
            return self
        if rank not in self._by_rank:
            if len(self._by_rank) >= MAX_RANKS:
                raise ProtocolError(
                    f"adapters of rank {rank}, and others of {MAX_RANKS} ranks in one job: "
                    f"{', '.join(map(str, sorted(self._by_rank)))}. Use one of these"
                )
            self._by_rank[rank] = PartedModel(task=self.task, config=self.config, rank=rank)
        return self._by_rank[rank]

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
            self.adapters.refuse(parts, self.config)
            self._known[key] = parts
        return self._known[key]

    def _made(self, layout: str) -> ModelParts:
        split = self.config.split
        if self._is_decoder:
            return decoder_parts(self._model, split.cut, split.last_cut, frozen=self.is_frozen, names=self._inner)
        return traced_parts(
            self._model, example_of(layout), split.cut, split.last_cut, frozen=self.is_frozen, names=self._inner
        )

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
            self.task, names, self.adapters.begun(tensors, names, config), trained=self._trained - frozen,
            buffers=self._buffers - frozen, config=config, before=before,
        )  # fmt: skip

    def divided(self, parts: ModelParts, tensors: Tree) -> SplitTrees:
        """Return a job's tensors by who has them."""
        here, frozen = set(parts.of_device()), self._frozen_names(parts)
        moves, places = (self._trained | self._buffers) & here - frozen, self.adapters.places(self.names)
        moving = {name: name for name in tensors if places[name] in moves}
        there = {name: name for name in tensors if places[name] not in here}
        return SplitTrees(
            moving=renamed(tensors, moving),
            on_device=renamed(tensors, {name: name for name in tensors if name not in moving and name not in there}),
            in_cloud=renamed(tensors, there),
            buffers=tuple(name for name in moving if name in self._buffers),
        )

    def update(self, moved: Mapping[str, Array], before: Tree) -> Tree:
        """Return a device's update: its state after training minus the job's tensors before it."""
        others = self.adapters.without_factors(moved)
        changed = {
            name: np.asarray(subtract(others[self.names[name]], np.asarray(before[name])))
            for name in before
            if not is_low_rank(name)
        }
        return self.adapters.sent(moved, changed)

    def trained_in_cloud(self, parts: ModelParts, tensors: Tree) -> dict[str, str]:
        """Return a job's tensors that the cloud trains or counts: each name -> one of the same tensor."""
        moving, places = self.moving_in_cloud(parts), self.adapters.places(self.names)
        return {
            name: name if is_low_rank(name) else one
            for name, one in places.items()
            if one in moving and name in tensors
        }

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
