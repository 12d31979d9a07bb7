"""Two slots for each model, A and B, and one small file that names the active one.

Invariant: the file is replaced atomically, and the active slot is never written to. So after a power loss at any
moment there is a working release, if there was one before.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgefl.errors import HomeError, ManifestRejected, ProtocolError
from edgefl.logs import event
from edgefl.offload.generation.stage_info import STAGE_FILE, TOKENIZER_FILE, WEIGHTS_FILE
from edgefl.process.home import replace_file
from edgefl.protocols.inference.placement import ModelPart, Offload
from edgefl.protocols.inference.texts import TextStage
from edgefl.protocols.messages import BlobRef, RolloutNote, from_json

_log = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_OTHER: Mapping[str, str] = {"a": "b", "b": "a"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Installed:
    """The complete release in a slot."""

    version: int
    blob: BlobRef
    sample: BlobRef | None = None  # older releases have none
    offload: Offload | None = None  # how the release is placed; None = the whole model is in the slot
    placements: Sequence[str] = field(default_factory=list)  # those whose files are in the slot
    inputs: Mapping[str, str] = field(default_factory=dict)  # of a placed release: datatype and shape by name
    outputs: Mapping[str, str] = field(default_factory=dict)
    text: TextStage | None = None  # of a language model

    def parts(self) -> Mapping[str, ModelPart]:
        """Return the files that a placed release needs here, by name."""
        return {} if self.offload is None else self.offload.parts([*map(self.offload.placement, self.placements)])

    def same_files(self, other: Installed) -> bool:
        """Whether the files of another release are the same."""
        if (self.offload is None) != (other.offload is None):
            return False
        ours, theirs = (
            (one.blob, one.sample, one.parts(), None if one.text is None else (one.text.record, one.text.tokenizer))
            for one in (self, other)
        )
        return ours == theirs


@dataclass(frozen=True, slots=True)
class SlotFile:
    """A file of a release in a slot."""

    what: str  # in messages, such as `the sample of digits version 3`
    ref: BlobRef
    path: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotState:
    """The state of one model's slots, as stored in `state.json`."""

    model: str
    active: str | None = None  # a or b
    slots: Mapping[str, Installed] = field(default_factory=dict)
    sequence: int = -1  # of the last `Desired` that was processed
    outcome: RolloutNote | None = None  # its result
    trying: int = -1  # sequence of the `Desired` whose release is being loaded
    tries: int = 0  # number of attempts: a release that kills the agent is not tried forever
    starts: int = 0  # attempts to load the active release since it last served

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
            raise ManifestRejected(
                f"model name {model[:80]!r} is not 1 to 64 of A-Z a-z 0-9 . _ - (letter or digit first)"
            )
        self._folder = models / model
        for slot in _OTHER:
            (self._folder / slot).mkdir(mode=0o700, parents=True, exist_ok=True)
        self.state = self._load(model)

    def path(self, slot: str) -> Path:
        """Return the path of a slot's model file."""
        return self._folder / slot / "model.onnx"

    def whole_files(self) -> list[Path]:
        """Return where a slot has the file of a whole release, if there is one: of which others may be made."""
        return [self._folder / slot / name for slot in _OTHER for name in ("model.onnx", WEIGHTS_FILE)]

    def sample_path(self, slot: str) -> Path:
        """Return the path of the sample of a slot's model."""
        return self._folder / slot / "sample.safetensors"

    def files(self, slot: str, installed: Installed) -> list[SlotFile]:
        """Return the files of a release in a slot."""
        name, folder = f"{self.state.model} version {installed.version}", self._folder / slot
        if (text := installed.text) is not None:
            return [
                SlotFile(name, installed.blob, folder / WEIGHTS_FILE),
                SlotFile(f"the record of {name}", text.record, folder / STAGE_FILE),
                SlotFile(f"the tokenizer of {name}", text.tokenizer, folder / TOKENIZER_FILE),
            ]
        found = [] if installed.offload else [SlotFile(name, installed.blob, self.path(slot))]
        for part, files in installed.parts().items():
            found += [
                SlotFile(f"{part} of {name}", files.blob, folder / f"{part}.onnx"),
                SlotFile(f"the sample of {part} of {name}", files.sample, folder / f"{part}.safetensors"),
            ]
        if installed.sample is not None:
            found.append(SlotFile(f"the sample of {name}", installed.sample, self.sample_path(slot)))
        return found

    def clear(self, slot: str, keep: Sequence[SlotFile]) -> None:
        """Remove the files of a former release from a slot."""
        for path in (self._folder / slot).iterdir():
            if path not in {one.path for one in keep}:
                path.unlink()

    def base_path(self) -> Path:
        """Return the path of the file on which releases with adapters are made."""
        return self._folder / "base.onnx"

    def save(self, state: SlotState) -> None:
        """Replace the state, first on disk, then in memory."""
        replace_file(self._folder / "state.json", json.dumps(dataclasses.asdict(state)).encode())
        self.state = state

    def note(self, state: SlotState) -> None:
        """Replace the state; if the disk is full, only in memory. For changes that may be lost."""
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
        raise ProtocolError(f"it belongs to model {state.model!r}, not {model!r}")
    if unknown := {*state.slots, *([state.active] if state.active else [])} - set(_OTHER):
        raise ProtocolError(f"it names the slots {sorted(unknown)}; expected a and b")


def open_slots(models: Path, model: str) -> ModelSlots:
    """Return a model's slots; a damaged state file is renamed, and the model starts empty. Raises ManifestRejected.

    The version of the files in the slots is unknown then, so they are not served; the cloud sends the release again.
    """
    try:
        return ModelSlots(models, model)
    except HomeError as error:
        state = models / model / "state.json"
        event(_log, logging.ERROR, "release.state_damaged", model=model, reason=error)
        state.rename(state.with_name(f"state.damaged-{time.time_ns()}"))
        return ModelSlots(models, model)


def installed_models(models: Path) -> list[ModelSlots]:
    """Return the slots of every model in this home whose state can be read."""
    found = []
    for name in held_models(models):
        try:
            found.append(ModelSlots(models, name))
        except (HomeError, ManifestRejected, OSError) as error:
            event(_log, logging.WARNING, "release.state_damaged", model=name, reason=error)
    return found


def held_models(models: Path) -> list[str]:
    """Return the names of the models that have a state in this home, readable or not."""
    if not models.is_dir():
        return []
    return [folder.name for folder in sorted(models.iterdir()) if (folder / "state.json").exists()]
