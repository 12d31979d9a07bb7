"""LoRA adapters in a model that is trained in parts: each side trains those of its own layers.

A job has a matrix for each adapter (`edgefl.training.adapters`), a side's state has the factors and the base's weight:

    job's tensors  path.base_layer.weight W, path@lora D   -> state  W + D, new A drawn from (seed, round), B = 0
    after training, state  A, B                            -> update  path@lora as s B and A

So the mean of the products is exact on both sides, as without a split. Both sides draw the factors of all adapters, in
the model's order, and keep their own: they are those of unsplit training.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgefl.config import TrainConfig
from edgefl.errors import ConfigError, TaskError
from edgefl.offload.training.parts import ModelParts
from edgefl.settings.split import SHARED
from edgefl.training.adapters import Adapter, with_factors
from edgefl.training.adapters.layers import base_of, begun_factors
from edgefl.training.local import adapter_seed
from edgefl.trees import Array, Tree

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class PartedAdapters:
    """The trained adapters of a model in parts."""

    task: str
    model: torch.nn.Module  # its structure
    adapters: tuple[Adapter, ...]

    def places(self, names: Mapping[str, str]) -> dict[str, str]:
        """Return for each tensor of a job the one in the state that says on which side it is.

        `names` are all names in the state, with one for each tensor.
        """
        own = {name for one in self.adapters for name in one.factor_names}
        found = {name: one for name, one in names.items() if name not in own}
        return found | {one.matrix: names[one.factor_names[0]] for one in self.adapters}

    def begun(self, tensors: Tree, names: Collection[str], config: TrainConfig) -> Tree:
        """Return a side's state at the beginning of a round, at least these names, of a job's tensors."""
        if not self.adapters:
            return tensors
        new = begun_factors(self.model, self.adapters, adapter_seed(config.seed, config.round))
        found = {name: tensors[name] for name in names if name in tensors}
        for one in self._among(names):
            if one.matrix not in tensors or one.weight not in tensors:
                raise TaskError(
                    f"task {self.task!r}: {one.matrix} is missing among the tensors of this part; the job was "
                    "submitted with another model or cut"
                )
            found[one.weight] = base_of(one, tensors)
            found |= {name: new[name] for name in one.factor_names}
        return found

    def sent(self, state: Mapping[str, Array], others: Tree) -> Tree:
        """Return others' changes, and the factors that are in a state as changes of their matrices."""
        return with_factors(self._among(state), others, state)

    def without_factors(self, state: Mapping[str, Array]) -> dict[str, Array]:
        """Return what a state has beside factors of adapters."""
        own = {name for one in self.adapters for name in one.factor_names}
        return {name: array for name, array in state.items() if name not in own}

    def refuse(self, parts: ModelParts, config: TrainConfig) -> None:
        """Raise ConfigError for a cut through an adapter, and for a shared part that would have to begin anew."""
        here, there = set(parts.of_device()), set(parts.of_cloud())
        for one in self.adapters:
            own = {one.weight, *one.factor_names}
            if not (own <= here and own.isdisjoint(there)) and not (own <= there and own.isdisjoint(here)):
                raise ConfigError(
                    f"task {self.task!r}: a cut goes through the adapter of layer {one.path!r}; cut behind it"
                )
            if own <= there and config.split.cloud_part == SHARED:
                raise ConfigError(
                    f"task {self.task!r} trains the LoRA adapter of {one.path!r} in the cloud. Adapters begin anew in "
                    "each round, and the shared part goes on: set train.split.cloud_part='per-device'"
                )

    def _among(self, names: Collection[str]) -> tuple[Adapter, ...]:
        return tuple(one for one in self.adapters if one.factor_names[0] in names)
