"""The server's step: any `torch.optim` optimizer over the aggregated update.

FedOpt (Reddi et al. 2021, Algorithm 2): the mean delta is taken as a negative gradient, so that
SGD with lr 1 is FedAvg, SGD with momentum is FedAvgM, Adam is FedAdam. For FedSGD the aggregate is
the gradient itself: w <- w - lr * g.  Buffers and integers have no gradient; their mean change is added.
Frozen tensors do not change: no weight decay, no momentum.
Plain SGD runs in numpy; everything else needs torch, which is imported only then. Element-wise optimizers step many
small tensors as one concatenated tensor: otherwise thousands of tensors would cost thousands of calls per operation.
Matrices of low rank of which both trees have factors are stepped as factors by plain SGD, exactly: D + lr (B A) has the
factors of both, side by side. They become whole as soon as that is smaller, and for any other optimizer.
A mean that is read by blocks is stepped by blocks: by plain SGD when the new parameters are read, by an optimizer of
torch at once (`large_step`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from edgefl.aggregation.large_step import ELEMENTWISE, SCALARS, LargeStep
from edgefl.errors import ConfigError, MissingExtra
from edgefl.guards import not_finite_tree
from edgefl.settings.server import ServerConfig
from edgefl.trees import (
    Array,
    BlockTree,
    ComputedTree,
    EncodedTree,
    Factors,
    TensorSpec,
    Tree,
    apply,
    blocks,
    factors_of,
    is_float,
    read_block,
    spec_of,
)
from edgefl.trees.factors import are_smaller, factor_names, stacked
from edgefl.trees.scratch import ScratchTree
from edgefl.trees.tensors import array_of, tensor_of
from edgefl.trees.views import joined, renamed

_PART = "/"  # between a fragment's number and the names of its optimizer's state
_BUCKET_ELEMENTS = 1 << 18  # size of a bucket of small tensors: its temporaries stay in the cache


class ServerOptimizer:
    """Applies aggregated updates to the parameters, and keeps the optimizer's state from round to round.

    Raises ConfigError for an unknown optimizer or option, MissingExtra if torch is not installed.
    """

    def __init__(
        self, config: ServerConfig, *, gradient: bool, buffers: Collection[str] = (), frozen: Collection[str] = ()
    ) -> None:
        self._config = config
        self._sign = -1.0 if gradient else 1.0
        self._buffers, self._frozen = frozenset(buffers), frozenset(frozen)
        self._optimizers: tuple[_TorchOptimizer, ...] = ()  # one for each fragment of the model
        if config.optimizer != "SGD" or config.options:
            self._optimizers = tuple(_TorchOptimizer(config) for _ in range(config.fragments))

    def step(self, parameters: Tree, mean: Tree, *, lr_factor: float = 1.0, fragment: int = 0) -> Tree:
        """Return the parameters of the next round. Overwrites `mean`: its arrays may become part of the result.

        If the mean is read by blocks, so are they; plain SGD computes them from both trees whenever they are read.

        `lr_factor` multiplies the learning rate in this round; both trees are of the fragment with this number.
        """
        lr = self._config.lr * lr_factor
        optimizer = self._optimizers[fragment] if self._optimizers else None
        pairs = self._factors_after(parameters, mean, lr)
        if pairs:
            others = {name: name for name in parameters if name not in pairs}
            stored = {
                side: array
                for name, pair in pairs.items()
                for side, array in zip(factor_names(name), (pair.left, pair.right), strict=True)
            }
            new = self._step(optimizer, renamed(parameters, others), renamed(mean, others), lr)
            return joined(new, EncodedTree(stored))
        return self._step(optimizer, parameters, mean, lr)

    def _factors_after(self, parameters: Tree, mean: Tree, lr: float) -> dict[str, Factors]:
        """Return the new factors of the matrices that remain smaller as factors."""
        found: dict[str, Factors] = {}
        if self._optimizers or not isinstance(mean, BlockTree):
            return found
        for name in mean.factored:
            before, move = factors_of(parameters, name), factors_of(mean, name)
            if before is None or move is None or not are_smaller(before.rank + move.rank, move.shape):
                continue
            dtype = spec_of(parameters)[name].dtype
            found[name] = stacked([before.scaled(1.0, dtype), move.scaled(self._sign * lr, dtype)])
        return found

    def _step(self, optimizer: _TorchOptimizer | None, parameters: Tree, mean: Tree, lr: float) -> Tree:
        if isinstance(mean, BlockTree):
            if mean.reads_blocks:
                return self._step_by_blocks(optimizer, parameters, mean, lr)
            mean = {name: mean[name] for name in mean}
        trained = {name: array for name, array in parameters.items() if self._is_trained(name, array)}
        new = {name: self._untrained(name, array, mean) for name, array in parameters.items() if name not in trained}
        if optimizer is not None:
            new |= optimizer.step(trained, mean, lr, is_delta=self._sign > 0)
        else:
            new |= {name: self._plain(array, mean[name], lr) for name, array in trained.items()}
        return {name: new[name] for name in parameters}

    def state(self) -> Tree:
        """Return the optimizer's state as a tree, for a checkpoint; empty for plain SGD."""
        if len(self._optimizers) == 1:
            return self._optimizers[0].state()
        return joined(*(_of_fragment(index, one.state()) for index, one in enumerate(self._optimizers)))

    def fault(self) -> str | None:
        """Say which part of the optimizer's state is not finite, if any: no later step could recover from it."""
        return next(filter(None, (not_finite_tree(one.slots()) for one in self._optimizers)), None)

    def load(self, state: Tree) -> None:
        """Restore a state that `state` returned."""
        if len(self._optimizers) == 1:
            self._optimizers[0].load(state)
            return
        for index, one in enumerate(self._optimizers):
            prefix = f"{index}{_PART}"
            one.load(renamed(state, {name.removeprefix(prefix): name for name in state if name.startswith(prefix)}))

    def _step_by_blocks(
        self, optimizer: _TorchOptimizer | None, parameters: Tree, mean: BlockTree, lr: float
    ) -> BlockTree:
        """Return the new parameters as a tree that is read by blocks."""
        spec = spec_of(parameters)
        trained = {name: one for name, one in spec.items() if self._is_trained(name, one)}
        by_torch = None
        if optimizer is not None:
            by_torch = optimizer.step_large(trained, parameters, mean, lr, is_delta=self._sign > 0)

        def read(name: str, block: slice) -> Array:
            if by_torch is not None and name in trained:
                return by_torch.read(name, block)
            old = read_block(parameters, name, block)
            if name in self._frozen:
                return np.array(old)
            move = mean.read(name, block)
            return self._plain(old, move, lr) if name in trained else apply(old, move)

        return ComputedTree(spec, read)

    def _is_trained(self, name: str, tensor: Array | TensorSpec) -> bool:
        return is_float(tensor.dtype) and name not in self._buffers and name not in self._frozen

    def _untrained(self, name: str, array: Array, mean: Tree) -> Array:
        return array if name in self._frozen else apply(array, mean[name])

    def _plain(self, old: Array, mean: Array, lr: float) -> Array:
        flat_new, flat_old = mean.reshape(-1), old.reshape(-1)
        rate = old.dtype.type(self._sign * lr)
        for block in blocks(flat_new.size):
            flat_new[block] *= rate
            flat_new[block] += flat_old[block]
        return mean


def _of_fragment(index: int, state: Tree) -> Tree:
    return renamed(state, {f"{index}{_PART}{name}": name for name in state})


class _TorchOptimizer:
    def __init__(self, config: ServerConfig) -> None:
        try:
            import torch
        except ImportError as cause:
            raise MissingExtra(f"server.optimizer={config.optimizer!r}", "train") from cause
        kind = getattr(torch.optim, config.optimizer, None)
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
            raise ConfigError(f"server.optimizer={config.optimizer!r} is not an optimizer of torch.optim")
        self._kind: Callable[..., Any] = kind
        self._config = config
        self._probe()
        self._buckets: list[_Bucket] = []
        self._optimizer: Any = None
        self._pending: Tree = {}  # loaded, or of large parameters

    def step(self, parameters: Tree, mean: Tree, lr: float, *, is_delta: bool) -> dict[str, Array]:
        """Return the parameters after one step along a mean gradient, or a mean delta with its sign changed."""
        if not self._buckets:
            together = self._config.optimizer in ELEMENTWISE
            self._buckets = [_Bucket(names, parameters) for names in _bucketed(parameters, together=together)]
        for bucket in self._buckets:
            bucket.take(parameters, mean, is_delta=is_delta)
        if self._optimizer is None:
            self._optimizer = self._make([bucket.parameter for bucket in self._buckets])
            self._restore()
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        return {name: array for bucket in self._buckets for name, array in bucket.give()}

    def step_large(
        self, trained: Mapping[str, TensorSpec], parameters: Tree, mean: Tree, lr: float, *, is_delta: bool
    ) -> ScratchTree:
        """Return the trained parameters after one step, in a temporary file, as the new state is."""
        together = self._config.optimizer in ELEMENTWISE
        step = LargeStep(functools.partial(self._make, lr=lr), trained, self._pending, elementwise=together)
        new, self._pending = step.run(parameters, mean, is_delta=is_delta)
        return new

    def load(self, state: Tree) -> None:
        self._pending = state

    def state(self) -> Tree:
        if self._optimizer is None:
            return self._pending
        return {name: np.array(value) for name, value in self.slots().items()}

    def slots(self) -> Tree:
        """Return the optimizer's state tensors, as views."""
        if self._optimizer is None:
            return self._pending
        slots = self._optimizer.state_dict()["state"]
        return {
            f"{index}.{slot}": array_of(value) if hasattr(value, "detach") else np.asarray(value)
            for index, values in slots.items()
            for slot, value in values.items()
            if value is not None
        }

    def _restore(self) -> None:
        if not self._pending:
            return
        slots: dict[int, dict[str, Array]] = {}
        for key, array in self._pending.items():
            index, _, slot = key.partition(".")
            slots.setdefault(int(index), {})[slot] = array
        if len(slots) > len(self._buckets):  # saved by an edgefl version that stepped each tensor separately
            slots = self._joined(slots)
        state = {index: {slot: tensor_of(np.array(a)) for slot, a in of.items()} for index, of in slots.items()}
        whole = self._optimizer.state_dict()
        self._optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
        self._pending = {}

    def _joined(self, slots: Mapping[int, Mapping[str, Array]]) -> dict[int, dict[str, Array]]:
        """Return the state per bucket, joined from the state per tensor."""
        joined, start = {}, 0
        for index, bucket in enumerate(self._buckets):
            of_tensors = [slots[start + at] for at in range(len(bucket.names))]
            start += len(bucket.names)
            joined[index] = {
                slot: first if slot in SCALARS else bucket.joined([one[slot] for one in of_tensors])
                for slot, first in of_tensors[0].items()
            }
        return joined

    def _probe(self) -> None:
        """Take a trial step: a wrong option, or LBFGS, which needs a closure, is refused now and not in round 1."""
        import torch

        parameter = torch.nn.Parameter(torch.zeros(1))
        parameter.grad = torch.zeros(1)
        optimizer = self._make([parameter])
        try:
            optimizer.step()
        except (TypeError, ValueError, ArithmeticError, RuntimeError, AssertionError) as cause:  # torch uses assert
            raise ConfigError(f"server.optimizer={self._config.optimizer!r} cannot step on its own: {cause}") from cause

    def _make(self, parameters: list[Any], lr: float | None = None) -> Any:
        try:
            return self._kind(parameters, lr=self._config.lr if lr is None else lr, **self._config.options)
        except (TypeError, ValueError, ArithmeticError, RuntimeError, AssertionError) as cause:
            raise ConfigError(f"server.options={dict(self._config.options)}: {cause}") from cause


class _Bucket:
    """Concatenated tensors of one dtype, as one torch parameter; a single tensor keeps its shape."""

    def __init__(self, names: Sequence[str], parameters: Tree) -> None:
        import torch

        self.names = names
        self._shapes = [parameters[name].shape for name in names]
        self._shape = self._shapes[0] if len(names) == 1 else (-1,)
        self._nothing = tensor_of(np.empty(0, parameters[names[0]].dtype))
        self.parameter = torch.nn.Parameter(self._nothing)

    def joined(self, arrays: Sequence[Array]) -> Array:
        """Return the tensors' values, concatenated in a new array."""
        return np.concatenate([array.reshape(-1) for array in arrays]).reshape(self._shape)

    def take(self, parameters: Tree, mean: Tree, *, is_delta: bool) -> None:
        """Copy values and gradient into the bucket."""
        values = self.joined([parameters[name] for name in self.names])
        gradient = self.joined([mean[name] for name in self.names]).astype(values.dtype, copy=False)
        if is_delta:
            np.negative(gradient, out=gradient)
        self.parameter.data = tensor_of(values)
        self.parameter.grad = tensor_of(gradient)

    def give(self) -> Iterator[tuple[str, Array]]:
        """Yield the tensors by name; the bucket keeps neither values nor gradient."""
        start, flat = 0, array_of(self.parameter).reshape(-1)
        self.parameter.data, self.parameter.grad = self._nothing, None
        for name, shape in zip(self.names, self._shapes, strict=True):
            size = math.prod(shape)
            yield name, flat[start : start + size].reshape(shape)
            start += size


def _bucketed(parameters: Tree, *, together: bool) -> Iterator[list[str]]:
    """Yield groups of names, one per bucket: neighbours of one dtype, as many as fit."""
    names: list[str] = []
    elements, dtype = 0, None
    for name, array in parameters.items():
        if names and not (together and array.dtype == dtype and elements + array.size <= _BUCKET_ELEMENTS):
            yield names
            names, elements = [], 0
        names.append(name)
        elements, dtype = elements + array.size, array.dtype
    if names:
        yield names
