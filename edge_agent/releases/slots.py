"""Two places for each model, A and B, and one small file that says which of them counts.

Invariant: the file is replaced in one step, and the slot that it names active is never written to; so
whenever the power goes, there is a release that works, if there ever was one.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgefl.errors import HomeError, ManifestRejected, ProtocolError
from edgefl.logs import event
from edgefl.process.home import replace_file
from edgefl.protocols.messages import BlobRef, RolloutNote, from_json

_log = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_OTHER: Mapping[str, str] = {"a": "b", "b": "a"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Installed:
    """What lies whole in a slot."""

    version: int
    blob: BlobRef


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotState:
    """What is known of one model."""

    model: str
    active: str | None = None  # a or b
    slots: Mapping[str, Installed] = field(default_factory=dict)
    sequence: int = -1  # of the last `Desired` that was dealt with
    outcome: RolloutNote | None = None  # of that one
    trying: int = -1  # sequence whose release is being loaded
    tries: int = 0  # how often that was begun: a release that kills the agent is not tried for ever
    starts: int = 0  # how often an agent began to load the active release since it last served

    @property
    def spare(self) -> str:
        """The slot to write to."""
        return _OTHER[self.active] if self.active else "a"

    @property
    def serving(self) -> Installed | None:
        return self.slots.get(self.active) if self.active else None


class ModelSlots:
    """The slots of one model, under `HOME/models/<model>/`."""

    def __init__(self, models: Path, model: str) -> None:
        if _NAME.fullmatch(model) is None:
            raise ManifestRejected(f"model name {model[:80]!r} cannot be a folder's name")
        self._folder = models / model
        for slot in _OTHER:
            (self._folder / slot).mkdir(mode=0o700, parents=True, exist_ok=True)
        self.state = self._load(model)

    def path(self, slot: str) -> Path:
        """Return where a slot's model is."""
        return self._folder / slot / "model.onnx"

    def save(self, state: SlotState) -> None:
        """Replace the state, on the disk first."""
        replace_file(self._folder / "state.json", json.dumps(dataclasses.asdict(state)).encode())
        self.state = state

    def note(self, state: SlotState) -> None:
        """Replace what may be forgotten: where the disk is full, this process alone knows it."""
        try:
            self.save(state)
        except OSError as error:
            event(_log, logging.ERROR, "release.not_noted", model=state.model, reason=error)
            self.state = state

    def _load(self, model: str) -> SlotState:
        path = self._folder / "state.json"
        try:
            state = from_json(SlotState, json.loads(path.read_text(encoding="utf-8")))
            _check(state, model)
        except FileNotFoundError:
            return SlotState(model=model)
        except (OSError, ValueError, TypeError, RecursionError) as cause:
            raise HomeError(
                f"{path} is damaged: {cause}. Remove {self._folder} to have the release sent again"
            ) from cause
        return state


def _check(state: SlotState, model: str) -> None:
    if state.model != model:
        raise ProtocolError(f"it is of model {state.model!r}")
    if unknown := {*state.slots, *([state.active] if state.active else [])} - set(_OTHER):
        raise ProtocolError(f"it names the slots {sorted(unknown)}; there are a and b")


def open_slots(models: Path, model: str) -> ModelSlots:
    """Return a model's slots; a damaged state is set aside, and the model begins anew. Raises ManifestRejected.

    What the slots hold is then of no known version, so it is not served: the fleet sends the release again.
    """
    try:
        return ModelSlots(models, model)
    except HomeError as error:
        state = models / model / "state.json"
        event(_log, logging.ERROR, "release.state_damaged", model=model, reason=error)
        state.rename(state.with_name(f"state.damaged-{time.time_ns()}"))
        return ModelSlots(models, model)


def installed_models(models: Path) -> list[ModelSlots]:
    """Return the slots of every model that this home has and whose state can be read."""
    found = []
    for name in held_models(models):
        try:
            found.append(ModelSlots(models, name))
        except (HomeError, ManifestRejected, OSError) as error:
            event(_log, logging.WARNING, "release.state_damaged", model=name, reason=error)
    return found


def held_models(models: Path) -> list[str]:
    """Return the names of the models of which this home has a state, readable or not."""
    if not models.is_dir():
        return []
    return [folder.name for folder in sorted(models.iterdir()) if (folder / "state.json").exists()]
