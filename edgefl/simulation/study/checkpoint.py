"""Checkpoints: a simulation's state after a round in one file, from which it can continue.

The file is a tree (see `edgefl.trees`): parameters, the server optimizer's state, how often clients took part,
the state of batteries; and `facts`, JSON: the rounds so far, virtual time, the settings.
Invariants: if the process dies, the file is the old or the new one; a simulation that continues gives the
same result as an undisturbed one, bit for bit with the engine `loop`, up to rounding with others.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgefl.config import JobConfig
from edgefl.errors import ConfigError, HomeError, ProtocolError
from edgefl.process.home import lock_home
from edgefl.records import Counts, RoundReport
from edgefl.trees import Array, BlockTree, SpooledTree, Tree, spec_of, write_tree
from edgefl.trees.scratch import settled
from edgefl.trees.views import joined, renamed

FILE = "checkpoint.safetensors"
FORMAT = 1
GROWS = "rounds.count"  # the one setting that may differ
_PARAMETERS, _OPTIMIZER = "parameters/", "optimizer/"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A simulation's state after a round."""

    task: str
    engine: str
    settings: Mapping[str, Any]  # flat
    rounds: Sequence[RoundReport]
    seconds: float  # duration so far
    virtual_s: float | None  # virtual time
    parameters: Tree
    optimizer: Tree
    took_part: Counts
    spent: Array  # state of the devices' batteries, see `Devices.spent`
    durations: Mapping[str, Sequence[float]] = field(default_factory=dict)  # of clients, see `Durations.as_json`
    history: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # of `edgefl.choosing.history`, if it is read
    client_states: str = ""  # the folder of what clients keep, until the process ends; not in the file

    @property
    def round(self) -> int:
        """The last finished round."""
        return len(self.rounds)


class Checkpoints:
    """A folder with the latest checkpoint of one simulation."""

    def __init__(self, folder: Path, every: int = 1) -> None:
        self._folder, self._every = folder, every

    def due(self, round_number: int) -> bool:
        """Whether to write a checkpoint after this round."""
        return round_number % self._every == 0

    def write(self, checkpoint: Checkpoint) -> None:
        """Replace the previous checkpoint by this one; raises ConfigError if that fails."""
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
    """Lock the folder for checkpoints: `folder`, else `resume`; yields None if neither is given.

    Raises ConfigError for a folder that another process has locked, or with a checkpoint that is not resumed.
    """
    if resume is not None:
        refuse_no_checkpoint(resume)
    folder = folder if folder is not None else resume
    if folder is None:
        yield None
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_home(folder)
    except HomeError as cause:
        raise ConfigError(f"{folder} is in use by another simulation; choose another folder, or end it") from cause
    except OSError as cause:
        raise ConfigError(f"cannot keep checkpoints in {folder}: {cause.strerror}") from cause
    with lock:
        if (folder / FILE).exists() and (resume is None or not folder.samefile(resume)):
            raise ConfigError(f"{folder} has a checkpoint; continue with --resume {folder}, or choose another folder")
        yield Checkpoints(folder, every)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint; raises ConfigError if there is none, or the file is something else."""
    path = folder / FILE
    try:
        tree = SpooledTree(path)
        facts = json.loads(tree["facts"].tobytes())
        if facts["format"] != FORMAT:
            raise ConfigError(f"{path} has format {facts['format']}; this edgefl knows format {FORMAT}")
        return Checkpoint(
            task=str(facts["task"]), engine=str(facts["engine"]), settings=dict(facts["settings"]),
            rounds=[RoundReport.from_json(one) for one in facts["rounds"]],
            seconds=float(facts["seconds"]), virtual_s=facts["virtual_s"],
            parameters={name: np.array(array) for name, array in _part(tree, _PARAMETERS).items()},
            optimizer=_own(_part(tree, _OPTIMIZER)),
            took_part=np.array(tree["took_part"]), spent=np.array(tree["spent"]), durations=facts.get("durations", {}),
            history=dict(facts.get("history", {})),
        )  # fmt: skip
    except OSError as cause:
        raise ConfigError(f"cannot read {path}: {cause.strerror}") from cause
    except (ProtocolError, KeyError, ValueError, TypeError) as cause:
        if isinstance(cause, ConfigError):
            raise
        raise ConfigError(
            f"{path} is damaged, or not a checkpoint of a simulation: {cause}. Start again without it"
        ) from cause


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of a checkpoint by section, as in a TOML file; raises ConfigError if there is none."""
    refuse_no_checkpoint(folder)
    nested: dict[str, Any] = {}
    for key, value in read_checkpoint(folder).settings.items():
        *sections, last = key.split(".")
        inner = nested
        for name in sections:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return nested


def refuse_no_checkpoint(folder: Path) -> None:
    """Raise ConfigError if a folder has no checkpoint."""
    if not (folder / FILE).is_file():
        raise ConfigError(f"{folder} has no checkpoint ({FILE}); --checkpoint {folder} makes them")


def refuse_another(saved: Checkpoint, task: str, config: JobConfig) -> None:
    """Raise ConfigError if a checkpoint has another task or other settings; the message names the difference."""
    if saved.task != task:
        raise ConfigError(f"the checkpoint is of task {saved.task!r}, not of {task!r}")
    now, defaults = flat_settings(config), flat_settings(type(config)())
    if config.train.schedule == "cosine" and saved.settings.get(GROWS) != now[GROWS]:
        raise ConfigError(
            f"the checkpoint was made with {GROWS}={saved.settings.get(GROWS)}, now it is {now[GROWS]}: the cosine "
            "schedule of train.lr spans all rounds, so their number stays"
        )
    for key in sorted({*saved.settings, *now} - {GROWS}):
        before, after = (
            saved.settings.get(key, defaults.get(key)),
            now.get(key),
        )  # an older checkpoint lacks newer settings
        if before != after:
            raise ConfigError(
                f"the checkpoint was made with {key}={_said(before)}, now it is {_said(after)}. A simulation continues "
                f"with its original settings; only {GROWS} may grow"
            )
    if now[GROWS] < saved.round:
        raise ConfigError(f"{GROWS}={now[GROWS]}, but the checkpoint already has {saved.round} rounds")


def refuse_other_shapes(saved: Checkpoint, parameters: Tree, num_clients: int) -> None:
    """Raise ConfigError if the task's model or population no longer matches the checkpoint."""
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


def _as_tree(checkpoint: Checkpoint) -> Tree:
    facts = {
        "format": FORMAT,
        **{name: getattr(checkpoint, name) for name in ("task", "engine", "settings", "seconds", "virtual_s")},
        "history": dict(checkpoint.history),
        "rounds": [one.as_json() for one in checkpoint.rounds],
        **({"durations": checkpoint.durations} if checkpoint.durations else {}),
    }
    rest: dict[str, Array] = {
        "facts": np.frombuffer(json.dumps(facts).encode(), np.uint8),
        "took_part": checkpoint.took_part,
        "spent": checkpoint.spent,
    }
    return joined(rest, *(
        renamed(tree, {prefix + name: name for name in tree})
        for prefix, tree in ((_PARAMETERS, checkpoint.parameters), (_OPTIMIZER, checkpoint.optimizer))
    ))  # fmt: skip


def _part(tree: Tree, prefix: str) -> Tree:
    return renamed(tree, {name.removeprefix(prefix): name for name in tree if name.startswith(prefix)})


def _own(tree: Tree) -> Tree:
    """Return a tree that stays as it is when the file is replaced: in memory, or in a temporary file."""
    return settled(tree) if isinstance(tree, BlockTree) else {name: np.array(array) for name, array in tree.items()}


def _said(value: Any) -> str:
    return "absent" if value is None else json.dumps(value)
