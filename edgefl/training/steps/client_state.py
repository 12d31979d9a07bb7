"""What a client keeps between rounds: its optimizer's state, and with fragments the model as it is on the client.

With `server.fragments` = P, a client receives the whole model once, then what the round before has changed. It goes on
with its own values of all others, and sends the change of one fragment since it received that one:

    start = own values, with those received in their place      base = what was received last, of each tensor
    update = trained - base, of the fragment of this round

As the server changes no other fragment, `base` is the global model of this round, which is also what is evaluated.
Where the whole model is received, nothing that was kept of the model counts.
Names: optimizer/.. (see `optimizer_state`), own/NAME, base/NAME.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgefl.config import TrainConfig
from edgefl.errors import ConfigError, TaskError
from edgefl.task import Task
from edgefl.training.steps.optimizer_state import refuse_no_optimizer
from edgefl.trees import Array, Tree, spec_of
from edgefl.trees.fragments import fragments_of, sent_part
from edgefl.trees.views import joined, renamed

OWN, BASE = "own/", "base/"


@dataclass(frozen=True, slots=True)
class RoundStart:
    """Where a client's training of a round begins."""

    start: Tree  # the client's parameters
    base: Tree  # the global ones
    sent: Tree  # those of `base` whose change is sent


def begin_from(received: Tree, state: Tree | None, train: TrainConfig) -> RoundStart:
    """Return where training begins, from what was received and what was kept; raises TaskError if tensors lack."""
    if train.fragments == 1:
        return RoundStart(received, received, received)
    own, base = kept_part(state, OWN), kept_part(state, BASE)
    start, base = (joined(own, received), joined(base, received)) if own.keys() >= received.keys() else (received,) * 2
    try:
        return RoundStart(start, base, sent_part(base, train))
    except ConfigError as cause:
        raise TaskError(f"what this client has of the model cannot be divided: {cause}") from cause


def model_state(begun: RoundStart, trained: Mapping[str, Array], train: TrainConfig) -> Tree:
    """Return what is kept of the model after a round; `trained` are all tensors that change."""
    if train.fragments == 1:
        return {}
    return {**{OWN + name: array for name, array in trained.items()}, **renamed(begun.base, _prefixed(begun.base))}


def kept_part(state: Tree | None, prefix: str) -> Tree:
    """Return the tensors of a kept state whose names begin like this, without that."""
    return renamed(state or {}, {name.removeprefix(prefix): name for name in state or () if name.startswith(prefix)})


def refuse_unkept(task: Task, train: TrainConfig, fragments: int, moving: Tree) -> None:
    """Raise ConfigError for settings whose state no client of this task can keep."""
    refuse_no_optimizer(task, train)
    if fragments > 1 and task.fit is not None:
        raise ConfigError(
            f"server.fragments={fragments}: task {task.name!r} has its own fit, which gets the whole model"
        )
    fragments_of(spec_of(moving), fragments)


def _prefixed(base: Tree) -> dict[str, str]:
    return {BASE + name: name for name in base}
