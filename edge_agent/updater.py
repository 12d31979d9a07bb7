"""Brings the release that the fleet wants onto the device, and keeps one that works while it does.

verify the signature -> is it newer -> download into the spare slot -> check hash and size -> load it and
run it once -> switch. Whatever fails before the switch leaves the old release serving, and is reported.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_agent.channel import CloudChannel
from edge_agent.sessions import Models, Served, load
from edge_agent.slots import Installed, ModelSlots, SlotState, installed_models
from edge_agent.transfer import download
from edgefl.errors import CloudUnreachable, EdgeflError, ManifestRejected, ProtocolError
from edgefl.logs import event
from edgefl.models.manifest import Desired, check_blob, check_version, verify
from edgefl.protocols.messages import RolloutNote, Signed

MAX_DETAIL_CHARS = 1000
MAX_TRIES = 2  # of a release during whose loading the agent died

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdaterParts:
    """What an updater works with."""

    device: str
    home: Path
    fleet_key: Ed25519PublicKey
    channel: CloudChannel
    models: Models
    tell: Callable[[RolloutNote], None]
    changed: Callable[[], None]  # the versions that serve are others now


class Updater:
    """The releases of one agent. Used from its event loop."""

    def __init__(self, parts: UpdaterParts) -> None:
        self._parts = parts
        self._folder = parts.home / "models"
        self._slots = {slots.state.model: slots for slots in installed_models(self._folder)}
        self._wanted: dict[str, Desired] = {}  # by model
        self._told: set[tuple[str, int]] = set()  # outcomes that this process has reported
        self._wake = asyncio.Event()

    def hear(self, signed: Signed) -> None:
        """Note what the device should serve, if the fleet's key says so."""
        try:
            desired = verify(signed, Desired, self._parts.fleet_key)
        except ManifestRejected as error:
            event(_log, logging.WARNING, "release.rejected", reason=error)
            return
        if desired.device != self._parts.device:
            event(_log, logging.WARNING, "release.rejected", reason=f"it is for device {desired.device}")
            return
        model = desired.release.model
        if model not in self._wanted or self._wanted[model].sequence < desired.sequence:
            self._wanted[model] = desired
            self._wake.set()

    async def run(self) -> None:
        """Load what the device holds, then install what it should hold, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._wanted:
                desired = self._wanted[next(iter(self._wanted))]
                try:
                    await self._consider(desired)
                except CloudUnreachable as error:
                    event(_log, logging.WARNING, "release.put_off", model=desired.release.model, reason=error)
                if self._wanted.get(desired.release.model) is desired:
                    del self._wanted[desired.release.model]

    async def restore(self) -> None:
        """Serve the releases that the device holds: the active one, or if that is damaged the one before it."""
        for slots in self._slots.values():
            before = slots.state
            for slot in filter(None, (before.active, before.spare)):
                if slot in slots.state.slots and await self._restore(slots, slot):
                    break
        self._parts.changed()

    async def _restore(self, slots: ModelSlots, slot: str) -> bool:
        state, path = slots.state, slots.path(slot)
        installed = state.slots[slot]
        try:
            check_blob(f"{state.model} version {installed.version}", installed.blob, path)
            self._parts.models.put(await asyncio.to_thread(load, state.model, installed.version, path))
        except (EdgeflError, OSError) as error:
            event(_log, logging.ERROR, "release.damaged", model=state.model, slot=slot, reason=error)
            left = {name: one for name, one in state.slots.items() if name != slot}
            # One back: the `Desired` that brought it is to bring it again.
            slots.save(dataclasses.replace(state, active=None, slots=left, sequence=state.sequence - 1))
            return False
        if slot != state.active:
            slots.save(dataclasses.replace(state, active=slot))
        event(_log, logging.INFO, "release.serves", model=state.model, version=installed.version, slot=slot)
        return True

    async def _consider(self, desired: Desired) -> None:
        slots = self._slots_of(desired.release.model)
        if slots is None:
            return
        state = slots.state
        if desired.sequence < state.sequence:
            event(_log, logging.WARNING, "release.replayed", model=state.model, sequence=desired.sequence,
                  known=state.sequence)  # fmt: skip
        elif desired.sequence == state.sequence:
            if state.outcome and (state.model, state.sequence) not in self._told:
                self._report(state)  # the process before us may not have been heard
        else:
            await self._install(slots, desired)

    def _slots_of(self, model: str) -> ModelSlots | None:
        try:
            if model not in self._slots:
                self._slots[model] = ModelSlots(self._folder, model)
        except EdgeflError as error:
            event(_log, logging.WARNING, "release.rejected", reason=error)
            return None
        return self._slots[model]

    async def _install(self, slots: ModelSlots, desired: Desired) -> None:
        release, before = desired.release, slots.state.serving
        try:
            check_version(desired, before.version if before else None)
            self._count_try(slots, desired)
            slot = await self._fetch(slots, desired)
            served = await asyncio.to_thread(load, release.model, release.version, slots.path(slot))
        except CloudUnreachable:
            slots.save(dataclasses.replace(slots.state, trying=-1, tries=0))
            raise
        except (EdgeflError, OSError) as error:
            self._settle(slots, desired, "failed", str(error))
            return
        self._tell(desired, "installed")
        self._switch(slots, desired, slot, served)

    def _count_try(self, slots: ModelSlots, desired: Desired) -> None:
        state = slots.state
        tries = state.tries + 1 if state.trying == desired.sequence else 1
        if tries > MAX_TRIES:
            raise ProtocolError(f"the agent died {MAX_TRIES} times while it loaded this release")
        slots.save(dataclasses.replace(state, trying=desired.sequence, tries=tries))

    async def _fetch(self, slots: ModelSlots, desired: Desired) -> str:
        """Return the slot that holds the release's bytes, checked; one that has them already is not sent again."""
        release, state = desired.release, slots.state
        name = f"{release.model} version {release.version}"
        for slot, installed in state.slots.items():
            if installed.blob == release.blob:
                with suppress(ManifestRejected, OSError):  # damaged: it is sent again
                    check_blob(name, release.blob, slots.path(slot))
                    return slot
        self._tell(desired, "downloading")
        left = {slot: installed for slot, installed in state.slots.items() if slot != state.spare}
        slots.save(dataclasses.replace(state, slots=left))
        path = slots.path(state.spare)
        await download(self._parts.channel, release.blob, path)
        check_blob(name, release.blob, path)
        _sync(path)
        return state.spare

    def _switch(self, slots: ModelSlots, desired: Desired, slot: str, served: Served) -> None:
        release = desired.release
        filled = {**slots.state.slots, slot: Installed(version=release.version, blob=release.blob)}
        slots.save(dataclasses.replace(slots.state, active=slot, slots=filled))
        self._parts.models.put(served)
        self._settle(slots, desired, "active")
        self._parts.changed()

    def _settle(self, slots: ModelSlots, desired: Desired, state: str, detail: str = "") -> None:
        release = desired.release
        note = RolloutNote(model=release.model, version=release.version, state=state, detail=detail[:MAX_DETAIL_CHARS])
        slots.save(dataclasses.replace(slots.state, sequence=desired.sequence, outcome=note, trying=-1, tries=0))
        self._report(slots.state)

    def _report(self, state: SlotState) -> None:
        if state.outcome is not None:
            self._told.add((state.model, state.sequence))
            level = logging.WARNING if state.outcome.state == "failed" else logging.INFO
            event(_log, level, f"release.{state.outcome.state}", model=state.model, version=state.outcome.version,
                  detail=state.outcome.detail or "-")  # fmt: skip
            self._parts.tell(state.outcome)

    def _tell(self, desired: Desired, state: str) -> None:
        release = desired.release
        event(_log, logging.INFO, f"release.{state}", model=release.model, version=release.version)
        self._parts.tell(RolloutNote(model=release.model, version=release.version, state=state))


def _sync(path: Path) -> None:
    """Bring a file and its name to the disk."""
    for target in (path, path.parent):
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
