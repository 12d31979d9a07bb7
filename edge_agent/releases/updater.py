"""Installs the release that the cloud desires, while a working one keeps serving.

Verify the signature, check that it is newer, download into the spare slot, check hash and size, load it and run
it on its sample in a separate process, switch. If a step before the switch fails, the old release keeps serving, and
the failure is reported. Models are independent: a slow one delays no other, and a newer `Desired` cancels an older one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import math
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_agent.link.channel import CloudChannel
from edge_agent.link.transfer import download
from edge_agent.placement.placed_file import PlacedFile, text_of
from edge_agent.releases.model_file import ModelFile
from edge_agent.releases.patched import make_from_base
from edge_agent.releases.slots import Installed, ModelSlots, SlotState, held_models, open_slots
from edgefl.errors import CloudUnreachable, EdgeflError, ManifestRejected, ProtocolError
from edgefl.logs import event
from edgefl.process.durable import flush
from edgefl.protocols.fields import to_json
from edgefl.protocols.manifest import Desired, Release, check_blob, check_version, verify
from edgefl.protocols.messages import RolloutNote, Signed

MAX_DETAIL_CHARS = 1000
MAX_TRIES = 2  # to load a new release, if the agent dies in the meantime
MAX_STARTS = 3  # the same for a release that has served before

_log = logging.getLogger(__name__)


class _Job(NamedTuple):
    """Running work on one model."""

    sequence: int  # of the `Desired` that it is for
    work: asyncio.Task[None]


class PreparedModel(Protocol):
    """A loaded model that is not served yet."""

    def switch(self) -> None:
        """Serve this model instead of the previous version."""

    def forget(self) -> None:
        """Unload this model: it will not be served."""


class ModelHost(Protocol):
    """The process that loads and serves models; implemented by `edge_agent.releases.host`."""

    async def prepare(self, model: ModelFile, *, trial: bool) -> PreparedModel:
        """Load a model while others serve, with `trial` in a separate process first; raises ProtocolError."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdaterDependencies:
    """The dependencies of an updater."""

    device: str
    home: Path
    fleet_key: Ed25519PublicKey
    channel: CloudChannel
    host: ModelHost
    report: Callable[[RolloutNote], None]  # sends a report to the cloud
    changed: Callable[[], None]  # called when the served versions have changed
    placement: str = ""  # of releases that are placed: auto, device, cloud or split:NODE; empty = the release's own
    serving_bytes: float = math.inf  # that predictions may use


class Updater:
    """The releases of one agent. Used from its event loop."""

    def __init__(self, deps: UpdaterDependencies) -> None:
        self._deps = deps
        self._folder = deps.home / "models"
        self._slots: dict[str, ModelSlots] = {}
        self._desired: dict[str, Desired] = {}  # by model
        self._failing: dict[str, tuple[ModelFile, str]] = {}  # by model: the release that crashes the process, and why
        self._held = held_models(self._folder)  # installed by an earlier process, not loaded yet
        self._jobs: dict[str, _Job] = {}  # running work, at most one per model
        self._unfinished: set[str] = (
            set()
        )  # models whose restore is not finished; a newer `Desired` may have cancelled it
        self._reported: set[tuple[str, int]] = set()  # (model, sequence) whose outcome this process has reported
        self._wake = asyncio.Event()

    def handle(self, signed: Signed) -> None:
        """Accept a signed `Desired`; ignored unless the fleet's key signed it. A newer one cancels work on an older."""
        try:
            desired = verify(signed, Desired, self._deps.fleet_key)
        except ManifestRejected as error:
            event(_log, logging.WARNING, "release.rejected", reason=error)
            return
        if desired.device != self._deps.device:
            event(_log, logging.WARNING, "release.rejected", reason=f"it is for device {desired.device}, not this one")
            return
        model = desired.release.model
        if model not in self._desired or self._desired[model].sequence < desired.sequence:
            self._desired[model] = desired
            self._wake.set()
            job = self._jobs.get(model)
            if job is not None and job.sequence < desired.sequence:
                event(_log, logging.INFO, "release.superseded", model=model, sequence=job.sequence)
                job.work.cancel()

    def handle_failing(self, model: ModelFile, reason: str) -> None:
        """Accept the report that a release crashes the serving process repeatedly."""
        self._failing[model.name] = (model, reason)
        self._wake.set()

    async def run(self) -> None:
        """Install desired releases, each model in its own task, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            running: dict[str, asyncio.Task[None]] = {}
            while True:
                await self._wake.wait()
                self._wake.clear()
                for model in {*self._desired, *self._failing}:
                    if model not in running or running[model].done():
                        running[model] = tasks.create_task(self._process(model), name=f"release {model}")

    async def restore(self) -> None:
        """Load the installed releases, in parallel; return when each of them serves or has failed."""
        names, self._held = self._held, []
        self._unfinished.update(names)
        opened = [slots for slots in map(self._slots_of, names) if slots is not None]
        await asyncio.gather(*(self._alone(slots.state.model, slots.state.sequence, self._start(slots))
                               for slots in opened))  # fmt: skip
        self._deps.changed()

    async def _process(self, model: str) -> None:
        """Process everything that is pending for one model."""
        while True:
            if (job := self._jobs.get(model)) is not None:  # its releases are being restored
                await asyncio.wait([job.work])
                await asyncio.sleep(0)  # lets its owner remove it from `_jobs`
            elif model in self._failing:
                failed, reason = self._failing.pop(model)
                slots = self._slots_of(model)
                if slots is not None:
                    await self._alone(model, slots.state.sequence, self._fall_back(slots, failed, reason))
            elif model in self._desired:
                desired = self._desired[model]
                await self._alone(model, desired.sequence, self._consider(desired))
                if self._desired.get(model) is desired:
                    del self._desired[model]
                    await self._make_up(model)
            else:
                return

    async def _make_up(self, model: str) -> None:
        """Serve the installed release, if the `Desired` that cancelled its restore did not replace it."""
        if model in self._unfinished and (slots := self._slots_of(model)) is not None:
            await self._alone(model, slots.state.sequence, self._start(slots))

    async def _alone(self, model: str, sequence: int, work: Coroutine[None, None, None]) -> None:
        """Run work on a model; a newer `Desired` may cancel it."""
        job = self._jobs[model] = _Job(sequence, asyncio.create_task(work, name=f"release {model}"))
        try:
            await asyncio.wait([job.work])
            if not job.work.cancelled():
                job.work.result()
        except CloudUnreachable as error:
            event(_log, logging.WARNING, "release.put_off", model=model, reason=error)
        finally:
            job.work.cancel()  # no effect unless we are cancelled
            del self._jobs[model]

    async def _start(self, slots: ModelSlots) -> None:
        """Serve the active release, or the one before it if the active one fails."""
        before = slots.state
        for slot in filter(None, (before.active, before.spare)):
            if slot in slots.state.slots and await self._start_slot(slots, slot):
                break
        self._unfinished.discard(before.model)

    async def _start_slot(self, slots: ModelSlots, slot: str) -> bool:
        state = slots.state
        installed = state.slots[slot]
        tries = state.starts + 1
        try:
            if tries > MAX_STARTS:
                raise ProtocolError(f"the agent died {MAX_STARTS} times while it loaded this release")
            self._note_start(slots, tries)
            self._refuse_other_placement(installed)
            await asyncio.to_thread(_check_files, slots, slot, installed)
            ready = await self._deps.host.prepare(self._model(slots, slot), trial=tries > 1)
        except asyncio.CancelledError:
            self._note_start(slots, tries - 1)
            raise
        except (EdgeflError, OSError) as error:
            event(_log, logging.ERROR, "release.damaged", model=state.model, slot=slot, reason=error)
            left = {name: one for name, one in state.slots.items() if name != slot}
            # One less, so that the `Desired` of this release is processed again.
            slots.note(dataclasses.replace(state, active=None, slots=left, sequence=state.sequence - 1, starts=0))
            return False
        if slot != state.active:
            slots.note(dataclasses.replace(slots.state, active=slot))
        ready.switch()
        self._note_start(slots, 0)
        event(_log, logging.INFO, "release.serves", model=state.model, version=installed.version, slot=slot)
        self._deps.changed()
        return True

    def _note_start(self, slots: ModelSlots, starts: int) -> None:
        slots.note(dataclasses.replace(slots.state, starts=starts))

    async def _fall_back(self, slots: ModelSlots, failed: ModelFile, reason: str) -> None:
        """Serve the previous release instead of one that crashes the serving process repeatedly."""
        state = slots.state
        serving = state.serving
        if serving is None or slots.path(state.active or "") != failed.path or serving.version != failed.version:
            return  # another release serves already
        event(_log, logging.ERROR, "release.failing", model=failed.name, version=failed.version, reason=reason)
        note = RolloutNote(model=failed.name, version=failed.version, state="failed", detail=reason[:MAX_DETAIL_CHARS])
        slots.note(dataclasses.replace(state, outcome=note))
        self._report(slots.state)
        if state.spare in state.slots:
            try:
                ready = await self._deps.host.prepare(self._model(slots, state.spare), trial=True)
            except (EdgeflError, OSError) as error:
                event(_log, logging.ERROR, "release.damaged", model=failed.name, slot=state.spare, reason=error)
                return
            slots.note(dataclasses.replace(slots.state, active=state.spare))
            ready.switch()
        self._deps.changed()

    def _model(self, slots: ModelSlots, slot: str) -> ModelFile:
        installed = slots.state.slots[slot]
        return _model_file(slots, slot, installed)

    def _installed(self, release: Release) -> Installed:
        """Return what of a release belongs on this device; raises ProtocolError if no placement fits it."""
        placed: dict[str, Any] = {}
        if (offload := release.offload) is not None:
            chosen = offload.chosen(self._deps.placement, self._deps.serving_bytes)
            placed = {"offload": offload, "placements": [one.name for one in chosen], "inputs": release.inputs,
                      "outputs": release.outputs}  # fmt: skip
        return Installed(
            version=release.version, blob=release.blob, sample=release.sample, text=release.text, **placed
        )  # fmt: skip

    def _refuse_other_placement(self, installed: Installed) -> None:
        """Raise ProtocolError if the files in a slot are for another placement than this agent was started with."""
        if installed.offload is not None:
            chosen = installed.offload.chosen(self._deps.placement, self._deps.serving_bytes)
            if (wanted := [one.name for one in chosen]) != [*installed.placements]:
                raise ProtocolError(
                    f"its files are for the placements {', '.join(installed.placements)}, and this agent uses "
                    f"{', '.join(wanted)}; it fetches what is missing"
                )

    async def _consider(self, desired: Desired) -> None:
        slots = self._slots_of(desired.release.model)
        if slots is None:
            return
        state = slots.state
        if desired.sequence < state.sequence:
            event(_log, logging.WARNING, "release.replayed", model=state.model, sequence=desired.sequence,
                  known=state.sequence)  # fmt: skip
        elif desired.sequence == state.sequence:
            if state.outcome and (state.model, state.sequence) not in self._reported:
                self._report(state)  # the report of an earlier process may have been lost
        else:
            await self._install(slots, desired)

    def _slots_of(self, model: str) -> ModelSlots | None:
        try:
            if model not in self._slots:
                self._slots[model] = open_slots(self._folder, model)
        except (EdgeflError, OSError) as error:
            event(_log, logging.WARNING, "release.rejected", reason=error)
            return None
        return self._slots[model]

    async def _install(self, slots: ModelSlots, desired: Desired) -> None:
        release, before = desired.release, slots.state.serving
        try:
            check_version(desired, before.version if before else None)
            self._count_try(slots, desired)
            installed = self._installed(release)
            slot = await self._fetch(slots, desired, installed)
            ready = await self._deps.host.prepare(_model_file(slots, slot, installed), trial=True)
            self._tell(desired, "installed")
            filled = {**slots.state.slots, slot: installed}
            slots.save(dataclasses.replace(slots.state, active=slot, slots=filled, starts=0))
        except (CloudUnreachable, asyncio.CancelledError):
            slots.note(dataclasses.replace(slots.state, trying=-1, tries=0))
            raise
        except (EdgeflError, OSError) as error:
            self._finish(slots, desired, "failed", str(error))
            return
        ready.switch()
        self._unfinished.discard(release.model)
        if installed.text is not None:
            self._remove_other_texts(slots)
        self._finish(slots, desired, "active")
        self._deps.changed()

    def _remove_other_texts(self, serving: ModelSlots) -> None:
        """Remove other language models: a device generates texts with one at a time, the last that was rolled out."""
        for slots in filter(None, map(self._slots_of, held_models(self._folder))):
            state = slots.state
            if slots is not serving and any(one.text is not None for one in state.slots.values()):
                event(_log, logging.INFO, "release.replaced", model=state.model, by=serving.state.model)
                slots.note(dataclasses.replace(state, active=None, slots={}))
                for slot in state.slots:
                    slots.clear(slot, [])
                slots.base_path().unlink(missing_ok=True)

    def _count_try(self, slots: ModelSlots, desired: Desired) -> None:
        state = slots.state
        tries = state.tries + 1 if state.trying == desired.sequence else 1
        if tries > MAX_TRIES:
            raise ProtocolError(f"the agent died {MAX_TRIES} times while it loaded this release")
        slots.note(dataclasses.replace(state, trying=desired.sequence, tries=tries))

    async def _fetch(self, slots: ModelSlots, desired: Desired, wanted: Installed) -> str:
        """Return the slot with the release's bytes, verified; downloads them unless a slot has them already."""
        state = slots.state
        for slot, installed in state.slots.items():
            if installed.same_files(wanted):
                with suppress(ManifestRejected, OSError):  # damaged: download it again
                    _check_files(slots, slot, installed)
                    return slot
        self._tell(desired, "downloading")
        left = {slot: installed for slot, installed in state.slots.items() if slot != state.spare}
        slots.save(dataclasses.replace(state, slots=left))
        files = slots.files(state.spare, wanted)
        for one in files:
            is_whole = one.path in slots.whole_files()
            if not (is_whole and await make_from_base(self._deps.channel, desired.release, slots, one.path)):
                if one.path.exists() and one.path.stat().st_nlink > 1:  # it is a base, too, which stays as it is
                    one.path.unlink()
                await download(self._deps.channel, one.ref, one.path, reuse=one.path)  # the old file is overwritten
            check_blob(one.what, one.ref, one.path)
            flush(one.path)
            flush(one.path.parent)
        slots.clear(state.spare, files)
        return state.spare

    def _finish(self, slots: ModelSlots, desired: Desired, state: str, detail: str = "") -> None:
        release = desired.release
        note = RolloutNote(model=release.model, version=release.version, state=state, detail=detail[:MAX_DETAIL_CHARS])
        slots.note(dataclasses.replace(slots.state, sequence=desired.sequence, outcome=note, trying=-1, tries=0))
        self._report(slots.state)

    def _report(self, state: SlotState) -> None:
        if state.outcome is not None:
            self._reported.add((state.model, state.sequence))
            level = logging.WARNING if state.outcome.state == "failed" else logging.INFO
            event(_log, level, f"release.{state.outcome.state}", model=state.model, version=state.outcome.version,
                  detail=state.outcome.detail or "-")  # fmt: skip
            self._deps.report(state.outcome)

    def _tell(self, desired: Desired, state: str) -> None:
        release = desired.release
        event(_log, logging.INFO, f"release.{state}", model=release.model, version=release.version)
        self._deps.report(RolloutNote(model=release.model, version=release.version, state=state))


def _check_files(slots: ModelSlots, slot: str, installed: Installed) -> None:
    """Raise ManifestRejected or OSError unless a slot's files are those that were signed."""
    for one in slots.files(slot, installed):
        check_blob(one.what, one.ref, one.path)


def _model_file(slots: ModelSlots, slot: str, installed: Installed) -> ModelFile:
    placed = None
    if installed.offload is not None:
        placed = PlacedFile(
            digest=installed.blob.sha256, offload=installed.offload, placements=installed.placements,
            inputs=installed.inputs, outputs=installed.outputs,
        )  # fmt: skip
    return ModelFile(
        name=slots.state.model, version=installed.version, path=slots.path(slot),
        sample=None if installed.sample is None else slots.sample_path(slot), placed=text_of(placed),
        text="" if installed.text is None else json.dumps(to_json(installed.text), sort_keys=True),
    )  # fmt: skip
