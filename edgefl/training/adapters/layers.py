"""The adapters in a model: which layers have them, their factors, their matrices in the base's weights.

Found are the linear layers of peft whose A and B both require a gradient. Kinds of adapters whose change is no product
s B A, or does not reach the layer's weight alone, are refused with the layer's name: DoRA, a bias, other layers than
linear ones, a tied or quantised weight, several adapters at once, adapters that do not begin at zero.
Invariant: a model with the matrix D in its weights and new adapters computes what its base with W + D computes.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from edgefl.errors import TaskError
from edgefl.training.randomness import seeded
from edgefl.trees import Array, EncodedTree, TensorSpec, Tree, factors_of
from edgefl.trees.factors import MARK, Factors, are_smaller, factor_names
from edgefl.trees.tensors import array_of, tensor_of

if TYPE_CHECKING:
    import torch

_INITS = (True, "gaussian")  # of A; B is zero


@dataclass(frozen=True, slots=True)
class Adapter:
    """The trained adapter of one layer."""

    path: str  # of the layer in the model
    layer: Any  # peft's
    name: str  # of the adapter in the layer

    @property
    def matrix(self) -> str:
        """The name of the base weight's change among a job's tensors."""
        return self.path + MARK

    @property
    def weight(self) -> str:
        """The name of the base's weight."""
        return f"{self.path}.base_layer.weight"

    @property
    def factor_names(self) -> tuple[str, str]:
        """The names of B and A in the model's state dict: tensors that a job does not have."""
        return f"{self.path}.lora_B.{self.name}.weight", f"{self.path}.lora_A.{self.name}.weight"

    @property
    def spec(self) -> TensorSpec:
        """The matrix: (outputs, inputs)."""
        return TensorSpec((self.left.shape[0], self.right.shape[1]), _whole_dtype(self.left, self.right))

    @property
    def left(self) -> torch.Tensor:
        """The trained B, (outputs, rank)."""
        weight: torch.Tensor = self.layer.lora_B[self.name].weight
        return weight

    @property
    def right(self) -> torch.Tensor:
        """The trained A, (rank, inputs)."""
        weight: torch.Tensor = self.layer.lora_A[self.name].weight
        return weight

    @property
    def scaling(self) -> float:
        """The factor s of the product: alpha / rank, or alpha / sqrt(rank)."""
        return float(self.layer.scaling[self.name])

    def moved(self, base: Array, matrix: Array) -> Array:
        """Return the base's weight with a matrix added, in the weight's dtype."""
        wide = np.promote_types(matrix.dtype, np.float32)
        total = base.astype(wide) + (matrix.T if self.layer.fan_in_fan_out else matrix)
        return np.asarray(total.astype(base.dtype))


def adapters_of(task: str, model: torch.nn.Module) -> tuple[Adapter, ...]:
    """Return a model's trained adapters; raises TaskError for one that is not s B A on a weight of its own."""
    if "peft" not in sys.modules:
        return ()
    from peft.tuners.lora import LoraLayer

    uses = Counter(id(one) for _, one in model.named_parameters(remove_duplicate=False))
    found: list[Adapter] = []
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            names = _trained(layer)
            if not names:
                continue
            if fault := _fault(layer, names, uses):
                raise TaskError(f"task {task!r}: the adapter of layer {path!r} {fault}")
            if _is_product(layer, names[0]):
                found.append(Adapter(path, layer, names[0]))
    return tuple(found)


def _trained(layer: Any) -> list[str]:
    """Return the names of a layer's adapters that have a trained factor."""
    sides = (layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B)
    held = {name: one for side in sides for name, one in side.items()}
    parameters = {name: [own[name] for own in sides if name in own] for name in held}
    return [name for name, own in parameters.items() if any(_requires_gradient(one) for one in own)]


def _requires_gradient(one: Any) -> bool:
    return one.requires_grad if hasattr(one, "requires_grad") else any(p.requires_grad for p in one.parameters())


def _is_product(layer: Any, name: str) -> bool:
    """Whether both factors are trained; of one alone the plain mean is exact."""
    return bool(layer.lora_A[name].weight.requires_grad and layer.lora_B[name].weight.requires_grad)


def _fault(layer: Any, names: list[str], uses: Counter[int]) -> str:
    """Say why a layer's change is not s B A on a weight of its own; empty if it is."""
    if len(names) > 1:
        return f"is one of several that are trained: {', '.join(names)}. Train one at a time"
    return _wrong_kind(layer, names[0]) or _wrong_weight(layer, names[0], uses)


def _wrong_kind(layer: Any, name: str) -> str:
    from peft.tuners.lora import Linear

    if getattr(layer, "use_dora", {}).get(name) or name in getattr(layer, "lora_magnitude_vector", {}):
        return (
            "is DoRA, which normalises the weights by column: its change is not a sum of products, so no average of it "
            "is exact. Leave use_dora out (use_rslora is fine)"
        )
    if name in getattr(layer, "lora_variant", {}):
        return f"is a variant of LoRA ({type(layer.lora_variant[name]).__name__}); expected plain LoRA or rsLoRA"
    if not isinstance(layer, Linear):
        return (
            f"is on a {type(layer.get_base_layer()).__name__}; adapters of linear layers are averaged. Leave this "
            "layer out of target_modules"
        )
    if getattr(layer, "lora_bias", {}).get(name):
        return "has a bias of its own (lora_bias=True), which is no part of the product. Leave lora_bias out"
    return ""


def _wrong_weight(layer: Any, name: str, uses: Counter[int]) -> str:
    weight = getattr(layer.get_base_layer(), "weight", None)
    if weight is None or not weight.is_floating_point():
        return "is on a quantised weight, to which no change can be added. Train adapters on a base of floating point"
    if layer.merged:
        return "is merged into its base. Return the model with unmerged adapters"
    if not _is_product(layer, name):
        return ""
    if weight.requires_grad:
        return "is on a weight that is trained, too. Freeze the weight (requires_grad_(False)), or drop the adapter"
    if uses[id(weight)] > 1:
        return (
            "is on a weight that another layer shares (tied), so the change would reach that one too. Leave the layer "
            "out of target_modules, or untie it"
        )
    return ""


def refuse_begun(task: str, adapters: tuple[Adapter, ...]) -> None:
    """Raise TaskError unless new adapters change nothing: B is zero."""
    for one in adapters:
        if bool(one.left.any()):
            raise TaskError(
                f"task {task!r}: the adapter of layer {one.path!r} does not begin at zero: its B is not 0. In each "
                "round adapters begin anew, so use init_lora_weights=True or 'gaussian', or merge what was trained "
                "before into the base"
            )


def begun_factors(model: torch.nn.Module, adapters: tuple[Adapter, ...], seed: int) -> dict[str, Array]:
    """Return new factors B and A under their names in the state, as `restart` makes them.

    Of a model without weights, its factors are made.
    """
    for one in adapters:
        for side in (one.layer.lora_A[one.name], one.layer.lora_B[one.name]):
            if side.weight.is_meta:
                side.to_empty(device="cpu")
    restart(model, adapters, seed)
    return {
        name: np.array(array_of(side))
        for one in adapters
        for name, side in zip(one.factor_names, (one.left, one.right), strict=True)
    }


def restart(model: torch.nn.Module, adapters: tuple[Adapter, ...], seed: int) -> None:
    """Begin a round: draw each A from a seed, as peft does at first, and set B to zero."""
    inits = {
        name: config.init_lora_weights
        for module in model.modules()
        for name, config in getattr(module, "peft_config", {}).items()
        if hasattr(config, "init_lora_weights")
    }
    with seeded(seed):
        for one in adapters:
            init = inits.get(one.name, True)
            one.layer.reset_lora_parameters(one.name, init if init in _INITS else True)


def nothing(adapters: tuple[Adapter, ...]) -> dict[str, Array]:
    """Return the matrices of a job's beginning, as factors of rank 0."""
    stored: dict[str, Array] = {}
    for one in adapters:
        (rows, columns), dtype = one.spec.shape, one.spec.dtype
        stored |= dict(zip(factor_names(one.matrix), (np.zeros((rows, 0), dtype), np.zeros((0, columns), dtype)),
                           strict=True))  # fmt: skip
    return stored


def with_factors(adapters: tuple[Adapter, ...], others: Tree, state: Mapping[str, Array] | None = None) -> Tree:
    """Return an update: other tensors' changes, and of each adapter the smaller of its factors and its matrix.

    `state` has the factors by their names in the model's state; None = the model has them.
    """
    if not adapters:
        return others
    stored = dict(others)
    for one in adapters:
        left, right = (state[name] for name in one.factor_names) if state else (array_of(one.left), array_of(one.right))
        pair = Factors(_scaled(left, one.scaling), np.array(right))
        if are_smaller(pair.rank, one.spec.shape):
            stored |= dict(zip(factor_names(one.matrix), (pair.left, pair.right), strict=True))
        else:
            stored[one.matrix] = pair.product().astype(one.spec.dtype)
    return EncodedTree(stored)


def base_of(adapter: Adapter, parameters: Tree) -> Array:
    """Return a base's weight W + D."""
    base, pair = np.asarray(parameters[adapter.weight]), factors_of(parameters, adapter.matrix)
    if pair is None or pair.rank:
        return adapter.moved(base, np.asarray(parameters[adapter.matrix]))
    return base


def put(adapter: Adapter, weight: torch.Tensor, parameters: Tree) -> None:
    """Set a base's weight to W + D."""
    weight.copy_(tensor_of(np.array(base_of(adapter, parameters))))


def without_adapters(model: torch.nn.Module, adapters: tuple[Adapter, ...]) -> torch.nn.Module:
    """Replace each layer that has an adapter by its base, in place; return the model, without peft's wrapper.

    The wrapper takes any arguments, so it would hide the names of the inputs.
    """
    layers = {id(one.layer): one.layer.get_base_layer() for one in adapters}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in layers:
                setattr(parent, name, layers[id(child)])
    return unwrapped(model)


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model in peft's wrapper, with its adapters; a model without a wrapper is returned."""
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else cast("torch.nn.Module", inner())


def _scaled(left: Array, scaling: float) -> Array:
    """Return s B, without rounding in 16 bits."""
    if scaling == 1:
        return np.array(left)
    is_exact = math.frexp(scaling)[0] == 0.5 or left.dtype.itemsize >= 4
    return np.asarray((left.astype(np.float64) * scaling).astype(left.dtype if is_exact else np.float32))


def _whole_dtype(left: torch.Tensor, right: torch.Tensor) -> np.dtype[Any]:
    return np.dtype(np.float64 if max(left.element_size(), right.element_size()) == 8 else np.float32)
