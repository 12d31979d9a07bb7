"""An optimizer's state as a tree, kept between rounds: AdamW's averages, momentum, numbers of steps.

In DiLoCo (Douillard et al. 2023, Algorithm 1) each worker keeps its inner optimizer's state, and never sends it.
Hyperparameters are not part of it: the optimizer of each round is made anew, with the round's learning rate.
Names are optimizer/POSITION/KEY: the parameter among those that are trained, and the optimizer's own key, as in
torch's state dict; a Python number is KEY:number, a 0-d array.
Invariant: an optimizer with a restored state takes the step that the first one would have taken, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgefl.config import TrainConfig
from edgefl.errors import ConfigError, TaskError
from edgefl.task import Task
from edgefl.trees import Array, Tree, why_not_sent
from edgefl.trees.tensors import array_of, tensor_of

if TYPE_CHECKING:
    import torch

OPTIMIZER = "optimizer/"
_NUMBER = ":number"


def refuse_no_optimizer(task: Task, config: TrainConfig) -> None:
    """Raise ConfigError if clients are to keep an optimizer's state, and the task has none."""
    if config.keep_optimizer_state and task.optimizer is None:
        why = "its own fit" if task.fit is not None else "no optimizer of its own, and plain SGD has no state"
        raise ConfigError(f"train.keep_optimizer_state=true: task {task.name!r} has {why}. Leave it out")


def optimizer_state(optimizer: torch.optim.Optimizer, trained: Sequence[torch.nn.Parameter]) -> dict[str, Array]:
    """Return the state of these parameters; all processes of a sharded model take part.

    Raises TaskError for a state that is neither tensors nor numbers, or not finite.
    """
    tree: dict[str, Array] = {}
    for position, parameter in enumerate(trained):
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is None:  # e.g. the momentum before the first step
                continue
            name = f"{OPTIMIZER}{position}/{key}"
            if isinstance(value, bool | int | float):
                tree[name + _NUMBER] = np.asarray(value)
            else:
                tree[name] = _array_of(optimizer, key, value)
    return tree


def restore_optimizer(optimizer: torch.optim.Optimizer, trained: Sequence[torch.nn.Parameter], tree: Tree) -> None:
    """Put a state into a new optimizer over the same parameters; raises TaskError if it is of another model."""
    owned = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for name in tree:
        if not name.startswith(OPTIMIZER):
            continue
        position, _, key = name.removeprefix(OPTIMIZER).partition("/")
        parameter = trained[int(position)] if position.isdecimal() and int(position) < len(trained) else None
        if parameter is None or id(parameter) not in owned:
            raise TaskError(f"the kept state of the optimizer has {name!r}; it now has {len(owned)} parameters")
        array = np.array(tree[name])  # in memory that is this optimizer's
        if key.endswith(_NUMBER):
            optimizer.state[parameter][key.removesuffix(_NUMBER)] = array.item()
        else:
            optimizer.state[parameter][key] = _placed(tensor_of(array), key, parameter, owned[id(parameter)])


def _array_of(optimizer: torch.optim.Optimizer, key: str, value: object) -> Array:
    import torch

    kind = type(optimizer).__name__
    if not isinstance(value, torch.Tensor):
        raise TaskError(
            f"the optimizer {kind} keeps a {type(value).__name__} as {key!r}; expected tensors and numbers. "
            "Leave train.keep_optimizer_state out, or use another optimizer"
        )
    complete = value.full_tensor() if hasattr(value, "full_tensor") else value
    try:
        array = np.array(array_of(complete), order="C")
    except (TypeError, RuntimeError) as cause:
        raise TaskError(f"the optimizer {kind} keeps {key!r}, which cannot be stored: {cause}") from cause
    if why := why_not_sent(array.dtype):
        raise TaskError(f"the optimizer {kind} keeps {key!r}, which cannot be stored: {why}")
    if not torch.isfinite(complete).all():
        raise TaskError(f"the state {key!r} of the optimizer {kind} is not finite after the training")
    return array


def _placed(value: torch.Tensor, key: str, parameter: torch.nn.Parameter, group: Mapping[str, Any]) -> torch.Tensor:
    """Return a tensor where the optimizer had it: beside its parameter, and sharded as it is; counters on the CPU.

    `Optimizer.load_state_dict` would also change its dtype to the parameter's.
    """
    if value.shape != parameter.shape or key == "step":
        on_device = group.get("capturable") or group.get("fused")
        return value.to(parameter.device) if on_device else value
    one: Any = parameter
    if not hasattr(one, "device_mesh"):
        return value.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    spread: Any = distribute_tensor  # which torch leaves without types
    sharded: torch.Tensor = spread(value.to(parameter.device), one.device_mesh, one.placements)
    return sharded
