"""The kinds of model, and how each is trained: where its task is, for how long, and how exactly engines agree."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TASKS = Path(__file__).parent / "task"


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A row of the table."""

    title: str
    task: str  # module:attribute, in the folder of the tasks
    lr: float = 0.2
    epochs: int = 30  # of one step each: a client's samples are one batch
    tolerance: float = 1e-3  # of parameters and predictions, relative to the largest value
    is_random: bool = False  # the training draws random numbers, so that plain PyTorch cannot repeat it
    sizes: tuple[int, ...] = ()  # further sizes of the second dimension, at serving

    @property
    def name(self) -> str:
        """The name of its task, and of its model in the fleet."""
        return self.task.partition(":")[2]


KINDS = (
    Kind(title="classification", task="tables:classification"),
    Kind(title="multi-label classification", task="tables:multi_label", lr=0.5),
    Kind(title="regression", task="tables:regression", lr=0.1),
)
