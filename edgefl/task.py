"""What is learned: a model, a loss, data and metrics, in one module of the user's.

    task = Task(name="digits", model=Net, loss=cross_entropy, train_data=load_part, test_data=load_test,
                metrics={"accuracy": accuracy})

A task is named by `package.module:attribute`, or by a folder whose pyproject.toml has
`[tool.edgefl] task = "module:attribute"`. Its folder travels to the devices as a bundle: a zip whose
bytes depend on the files alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgefl.errors import ConfigError
from edgefl.trees import Tree

if TYPE_CHECKING:
    import torch

    from edgefl.config import TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class FitResult:
    """What a `Task.fit` of the user's returns."""

    tree: Tree  # delta or gradient, same names, shapes and dtypes as the parameters
    weight: float  # number of samples
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A learning task. Give `model` and `loss` (PyTorch), or `initial` and `fit` (anything else).

    `train_data(**options)` returns (inputs, targets), arrays or tensors of equal first dimension: this
    device's own data; the options come from `edgefl agent start --data k=v`, as strings.
    `loss(outputs, targets)` is a mean over the batch. A metric maps (outputs, targets) to a mean too.
    """

    name: str
    model: Callable[[], torch.nn.Module] | None = None
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    train_data: Callable[..., tuple[Any, Any]] | None = None
    test_data: Callable[..., tuple[Any, Any]] | None = None  # held out, evaluated where the job is run
    metrics: Mapping[str, Callable[[torch.Tensor, torch.Tensor], float]] = field(default_factory=dict)
    optimizer: Callable[[Iterable[torch.nn.Parameter], float], torch.optim.Optimizer] | None = None  # (.., lr)
    initial: Callable[[], Tree] | None = None
    fit: Callable[[Tree, TrainConfig, Mapping[str, str]], FitResult] | None = None

    def __post_init__(self) -> None:
        torch_task = self.model is not None and self.loss is not None and self.train_data is not None
        if torch_task == (self.initial is not None and self.fit is not None):
            raise ConfigError(f"task {self.name!r} must have either model, loss and train_data, or initial and fit")
