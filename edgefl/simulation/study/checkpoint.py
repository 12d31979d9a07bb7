"""Where a simulation stands after a round, in one file, and going on from there.

The file is a tree (see `edgefl.trees`): parameters, the server optimizer's state, how often clients took part,
what batteries have spent; and `facts`, JSON: the rounds so far, virtual time, the settings.
Invariants: the file is the old one or the new one, whenever the process dies; a simulation that goes on
gives what an undisturbed one gives, bit for bit in a loop, to rounding in other engines.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgefl.config import JobConfig
from edgefl.errors import ConfigError, HomeError, ProtocolError
from edgefl.process.home import lock_home
from edgefl.records import Counts, RoundReport
from edgefl.trees import Array, SpooledTree, Tree, spec_of, write_tree

FILE = "checkpoint.safetensors"
FORMAT = 1
GROWS = "rounds.count"  # the one setting that may differ
_PARAMETERS, _OPTIMIZER = "parameters/", "optimizer/"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A simulation after some round."""

    task: str
    engine: str
    settings: Mapping[str, Any]  # flat
    rounds: Sequence[RoundReport]
    seconds: float  # that it took so far
    virtual_s: float | None  # the devices' clock
    parameters: Tree
    optimizer: Tree
    took_part: Counts
    spent: Array  # of the devices' batteries, see `Devices.spent`

    @property
    def round(self) -> int:
        """The last round that is in it."""
        return len(self.rounds)


class Checkpoints:
    """A folder that holds the last checkpoint of one simulation."""

    def __init__(self, folder: Path, every: int = 1) -> None:
        self._folder, self._every = folder, every

    def due(self, round_number: int) -> bool:
        """Whether this round is one to keep."""
        return round_number % self._every == 0

    def write(self, checkpoint: Checkpoint) -> None:
        """Put a checkpoint in the place of the last one; raises ConfigError where that cannot be done."""
        tree = _as_tree(checkpoint)
        temporary = self._folder / f".{FILE}"
        try:
            with temporary.open("wb") as file:
                write_tree(tree, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._folder / FILE)
        except OSError as cause:
            raise ConfigError(f"cannot write a checkpoint into {self._folder}: {cause.strerror}") from cause


@contextmanager
def open_checkpoints(folder: Path | None, resume: Path | None, every: int = 1) -> Iterator[Checkpoints | None]:
    """Hold the folder where checkpoints go: `resume` itself where no other is named, None where neither is.

    Raises ConfigError for a folder that another process holds, or that has a checkpoint which is not resumed.
    """
    if resume is not None and not (resume / FILE).is_file():
        raise ConfigError(f"{resume} has no checkpoint ({FILE}); --checkpoint {resume} makes them")
    folder = folder if folder is not None else resume
    if folder is None:
        yield None
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_home(folder)
    except HomeError as cause:
        raise ConfigError(f"{folder} is in use by another simulation; name another folder, or end it") from cause
    except OSError as cause:
        raise ConfigError(f"cannot keep checkpoints in {folder}: {cause.strerror}") from cause
    with lock:
        if (folder / FILE).exists() and (resume is None or not folder.samefile(resume)):
            raise ConfigError(f"{folder} has a checkpoint; go on with --resume {folder}, or name another folder")
        yield Checkpoints(folder, every)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read what `Checkpoints.write` wrote; raises ConfigError where there is nothing, or something else."""
    path = folder / FILE
    try:
        tree = {name: np.array(array) for name, array in SpooledTree(path).items()}
        facts = json.loads(tree.pop("facts").tobytes())
        if facts["format"] != FORMAT:
            raise ConfigError(f"{path} has format {facts['format']}; this edgefl knows format {FORMAT}")
        return Checkpoint(
            task=str(facts["task"]), engine=str(facts["engine"]), settings=dict(facts["settings"]),
            rounds=[RoundReport.from_json(one) for one in facts["rounds"]],
            seconds=float(facts["seconds"]), virtual_s=facts["virtual_s"],
            parameters=_part(tree, _PARAMETERS), optimizer=_part(tree, _OPTIMIZER),
            took_part=tree["took_part"], spent=tree["spent"],
        )  # fmt: skip
    except OSError as cause:
        raise ConfigError(f"cannot read {path}: {cause.strerror}") from cause
    except (ProtocolError, KeyError, ValueError, TypeError) as cause:
        if isinstance(cause, ConfigError):
            raise
        raise ConfigError(
            f"{path} is torn, or no checkpoint of a simulation: {cause}. Start anew without it"
        ) from cause


def refuse_another(saved: Checkpoint, task: str, config: JobConfig) -> None:
    """Raise ConfigError where a checkpoint is of another task or of other settings, naming what differs."""
    if saved.task != task:
        raise ConfigError(f"the checkpoint is of task {saved.task!r}, not of {task!r}")
    now, defaults = flat_settings(config), flat_settings(type(config)())
    if config.train.schedule == "cosine" and saved.settings.get(GROWS) != now[GROWS]:
        raise ConfigError(
            f"the checkpoint was made with {GROWS}={saved.settings.get(GROWS)}, now it is {now[GROWS]}: the cosine "
            "schedule of train.lr spans all rounds, so their number stays"
        )
    for key in sorted({*saved.settings, *now} - {GROWS}):
        before, after = saved.settings.get(key, defaults.get(key)), now.get(key)  # an older one lacks newer settings
        if before != after:
            raise ConfigError(
                f"the checkpoint was made with {key}={_said(before)}, now it is {_said(after)}. A simulation goes on "
                f"with the settings that it began with; only {GROWS} may grow"
            )
    if now[GROWS] < saved.round:
        raise ConfigError(f"{GROWS}={now[GROWS]}, but the checkpoint has {saved.round} rounds already")


def refuse_other_shapes(saved: Checkpoint, parameters: Tree, num_clients: int) -> None:
    """Raise ConfigError where the task's model, or its population, is no longer the checkpoint's."""
    before, now = spec_of(saved.parameters), spec_of(parameters)
    if odd := sorted(name for name in {*before, *now} if before.get(name) != now.get(name)):
        name = odd[0]
        raise ConfigError(
            f"the checkpoint's model is another: {name!r} is {before.get(name, 'absent')} there, and "
            f"{now.get(name, 'absent')} in the task"
        )
    if len(saved.took_part) != num_clients:
        raise ConfigError(f"the checkpoint is of {len(saved.took_part)} clients, there are {num_clients} now")


def flat_settings(config: JobConfig) -> dict[str, Any]:
    """Return `{"train.lr": 0.1, ..}`, as JSON gives it back."""
    flat: dict[str, Any] = {}

    def put(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key, one in value.items():
                put(f"{prefix}.{key}" if prefix else str(key), one)
        else:
            flat[prefix] = value

    put("", dataclasses.asdict(config))
    loaded: dict[str, Any] = json.loads(json.dumps(flat, default=str))
    return loaded


def _as_tree(checkpoint: Checkpoint) -> dict[str, Array]:
    facts = {
        "format": FORMAT,
        **{name: getattr(checkpoint, name) for name in ("task", "engine", "settings", "seconds", "virtual_s")},
        "rounds": [one.as_json() for one in checkpoint.rounds],
    }
    return {
        "facts": np.frombuffer(json.dumps(facts).encode(), np.uint8),
        "took_part": checkpoint.took_part,
        "spent": checkpoint.spent,
        **{_PARAMETERS + name: array for name, array in checkpoint.parameters.items()},
        **{_OPTIMIZER + name: array for name, array in checkpoint.optimizer.items()},
    }


def _part(tree: Tree, prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): array for name, array in tree.items() if name.startswith(prefix)}


def _said(value: Any) -> str:
    return "absent" if value is None else json.dumps(value)
