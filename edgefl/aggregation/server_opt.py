"""The step at the centre: any `torch.optim` optimizer over the aggregated update.

FedOpt (Reddi et al. 2021, Algorithm 2): the mean delta is taken as a negative gradient, so that
SGD with lr 1 is FedAvg, SGD with momentum is FedAvgM, Adam is FedAdam. For FedSGD the aggregate is
the gradient itself: w <- w - lr * g.  Buffers and integers have no gradient; they move by their mean.
What is frozen stays: no weight decay, no momentum.
Plain SGD runs in numpy; everything else needs torch, which is imported only then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from edgefl.config import ServerConfig
from edgefl.errors import ConfigError, MissingExtra
from edgefl.guards import not_finite_tree
from edgefl.trees import Array, Tree, apply, blocks, is_float
from edgefl.trees.tensors import array_of, tensor_of


class ServerOptimizer:
    """Moves the parameters by an aggregated update, and keeps the optimizer's state over rounds.

    Raises ConfigError for an unknown optimizer or option, MissingExtra where torch is absent.
    """

    def __init__(
        self, config: ServerConfig, *, gradient: bool, buffers: Collection[str] = (), frozen: Collection[str] = ()
    ) -> None:
        self._config = config
        self._sign = -1.0 if gradient else 1.0
        self._buffers, self._frozen = frozenset(buffers), frozenset(frozen)
        self._optimizer: _TorchOptimizer | None = None
        if config.optimizer != "SGD" or config.options:
            self._optimizer = _TorchOptimizer(config)

    def step(self, parameters: Tree, mean: Tree, *, lr_factor: float = 1.0) -> dict[str, Array]:
        """Return the parameters of the next round. Uses up `mean`: its arrays may become the result's.

        `lr_factor` is of this round: what the rate is multiplied by.
        """
        lr = self._config.lr * lr_factor
        trained = {name: array for name, array in parameters.items() if self._is_trained(name, array)}
        new = {name: self._untrained(name, array, mean) for name, array in parameters.items() if name not in trained}
        if self._optimizer is not None:
            gradients = {name: -self._sign * mean[name] for name in trained}
            new |= self._optimizer.step(trained, gradients, lr)
        else:
            new |= {name: self._plain(array, mean[name], lr) for name, array in trained.items()}
        return {name: new[name] for name in parameters}

    def state(self) -> dict[str, Array]:
        """Return the optimizer's state as a tree, for a checkpoint; empty for plain SGD."""
        return self._optimizer.state() if self._optimizer is not None else {}

    def fault(self) -> str | None:
        """Say which part of the optimizer's state is not finite, if one is: no later step would be."""
        return not_finite_tree(self._optimizer.slots()) if self._optimizer is not None else None

    def load(self, state: Tree) -> None:
        """Take up a state that `state` returned."""
        if self._optimizer is not None:
            self._optimizer.pending = dict(state)

    def _is_trained(self, name: str, array: Array) -> bool:
        return is_float(array.dtype) and name not in self._buffers and name not in self._frozen

    def _untrained(self, name: str, array: Array, mean: Tree) -> Array:
        return array if name in self._frozen else apply(array, mean[name])

    def _plain(self, old: Array, mean: Array, lr: float) -> Array:
        flat_new, flat_old = mean.reshape(-1), old.reshape(-1)
        rate = old.dtype.type(self._sign * lr)
        for block in blocks(flat_new.size):
            flat_new[block] *= rate
            flat_new[block] += flat_old[block]
        return mean


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
        self._parameters: dict[str, Any] = {}
        self._optimizer: Any = None
        self.pending: dict[str, Array] = {}

    def step(self, parameters: Tree, gradients: Tree, lr: float) -> dict[str, Array]:
        import torch

        if self._optimizer is None:
            self._parameters = {n: torch.nn.Parameter(tensor_of(np.array(a))) for n, a in parameters.items()}
            self._optimizer = self._make(list(self._parameters.values()))
            self._restore()
        for name, parameter in self._parameters.items():
            parameter.data.copy_(tensor_of(np.array(parameters[name])))
            parameter.grad = tensor_of(np.asarray(gradients[name], dtype=parameters[name].dtype))
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        return {name: array_of(parameter).copy() for name, parameter in self._parameters.items()}

    def state(self) -> dict[str, Array]:
        if self._optimizer is None:
            return self.pending
        return {name: np.array(value) for name, value in self.slots().items()}

    def slots(self) -> dict[str, Array]:
        """Return what the optimizer keeps, as views."""
        if self._optimizer is None:
            return {}
        slots = self._optimizer.state_dict()["state"]
        return {
            f"{index}.{slot}": array_of(value) if hasattr(value, "detach") else np.asarray(value)
            for index, values in slots.items()
            for slot, value in values.items()
            if value is not None
        }

    def _restore(self) -> None:

        if not self.pending:
            return
        slots: dict[int, dict[str, Any]] = {}
        for key, array in self.pending.items():
            index, _, slot = key.partition(".")
            slots.setdefault(int(index), {})[slot] = tensor_of(np.array(array))
        whole = self._optimizer.state_dict()
        self._optimizer.load_state_dict({"state": slots, "param_groups": whole["param_groups"]})
        self.pending = {}

    def _probe(self) -> None:
        """Take one step of nothing: refuses a wrong option, or LBFGS that wants a closure, now and not in round 1."""
        import torch

        parameter = torch.nn.Parameter(torch.zeros(1))
        parameter.grad = torch.zeros(1)
        optimizer = self._make([parameter])
        try:
            optimizer.step()
        except (TypeError, ValueError, ArithmeticError, RuntimeError, AssertionError) as cause:  # torch asserts
            raise ConfigError(f"server.optimizer={self._config.optimizer!r} cannot step on its own: {cause}") from cause

    def _make(self, parameters: list[Any]) -> Any:
        try:
            return self._kind(parameters, lr=self._config.lr, **self._config.options)
        except (TypeError, ValueError, ArithmeticError, RuntimeError, AssertionError) as cause:
            raise ConfigError(f"server.options={dict(self._config.options)}: {cause}") from cause
