"""The regions that are connected to this cloud, or to this region: what they are told, and what they say.

Everything is the latest state of an entry (`edgefl.protocols.tiers.mirror`), so a region that reconnects, or is killed
and started again, knows what it has to know after the first entries of its new stream.
Invariant: a region is heard only about devices that may connect below it; what else it says costs that entry only.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import logging
import threading
from collections.abc import AsyncIterable, Awaitable, Callable, Collection, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cloud.dataplane.open_rounds import OpenRounds
from cloud.region.parents import regions_in
from cloud.state.members import Membership, below, children
from edgefl.errors import ProtocolError
from edgefl.logs import event
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols import tiers
from edgefl.protocols.messages import Command, Deliver, Evaluate, Fit, JobMessage, RoundClosed, Signed, encode
from edgefl.protocols.tiers import LogSent, Member, Message, RegionState, Work
from edgefl.protocols.tiers.mirror import Mirror, MirrorCopy
from edgefl.protocols.tls import CLOUD_NAME, LEAF_DAYS

LEAD_S, LEAD_SHARE = 1.0, 0.1  # a region's deadline is this much before the round's: it has to send its sum

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChildrenDependencies:
    """What the regions are told from, and who hears what they say."""

    name: str  # of this cloud or region
    rounds: OpenRounds
    members: Membership
    crl: Callable[[], bytes]
    desired_for: Callable[[str], list[Signed]]
    running: Callable[[], Iterable[str]]  # jobs that have not ended
    heard: Callable[[str, str, str, bytes], None]  # region, device, kind, what the device said; b"" = it is gone
    told: Callable[[str, bytes | None], None] = lambda _key, _value: None  # entries about regions
    used: Callable[[str, str], None] = lambda _device, _serial: None  # the renewed certificate that a device uses
    parent_lists: Callable[[], Mapping[str, Signed]] = dict  # of all devices that have one
    certificate_days: Callable[[], float] = lambda: LEAF_DAYS  # how long new ones are valid
    log: Callable[[str, LogSent], None] = lambda _device, _log: None  # the end of a device's log has come
    is_over: Callable[[str, int], bool] = lambda _job, _round: True  # of a round that is not open: it will not be again


class Children:
    """All regions directly below. Methods may be called from any thread, except `attach`."""

    def __init__(self, deps: ChildrenDependencies) -> None:
        self._deps = deps
        self._lock, self._refreshing = threading.RLock(), threading.Lock()
        self._mirrors: dict[str, Mirror] = {}
        self._copies: dict[str, MirrorCopy] = {}
        self._streams: dict[str, object] = {}  # the newest of each region
        self._devices: dict[tuple[str, int], dict[str, dict[str, None]]] = {}  # job, round -> region -> its devices
        self._told: dict[tuple[str, int], dict[str, Work]] = {}  # job, round -> region -> its work, as last told
        self._messages: dict[tuple[str, int], dict[str, None]] = {}  # relay, number -> the regions that have it
        self._states: dict[str, RegionState] = {}
        self._inside: dict[str, frozenset[str]] = {}  # region -> the members below it
        self._told_running: set[str] = set()
        self.refresh()

    @property
    def shown_name(self) -> str:
        """The name of this cloud or region in messages."""
        return "the cloud" if self._deps.name == CLOUD_NAME else f"region {self._deps.name!r}"

    def regions(self) -> dict[str, RegionState]:
        """Return the regions below that are connected, also indirectly, as they say themselves."""
        with self._lock:
            return dict(self._states)

    def refresh(self) -> None:
        """Tell the regions who belongs to them; called when the fleet has changed."""
        with self._refreshing:  # so that none writes what it read before a later change
            self._refresh(self._deps.members.members(), self._deps.crl())

    def _refresh(self, members: Mapping[str, Member], crl: bytes) -> None:
        with self._lock:
            before, self._inside = self._inside, {}
            for region in children(self._deps.name, members):
                mirror = self._mirrors.setdefault(region, Mirror())
                inside = below(region, members)
                self._inside[region] = frozenset(inside)
                mirror.replace("member/", {f"member/{name}": tiers.pack(one) for name, one in inside.items()})
                mirror.set("revoked", crl)
            for gone in self._mirrors.keys() - self._inside.keys():
                del self._mirrors[gone]
            left = {region: inside - self._inside.get(region, frozenset()) for region, inside in before.items()}
        for region, devices in left.items():
            self._ask_no_more(region, devices)

    def note_running(self) -> None:
        """Tell the regions which jobs have not ended."""
        for mirror in self._all().values():
            mirror.set("running", functools.partial(self._running))

    def note_certificate_days(self) -> None:
        """Tell the regions how long new certificates are valid."""
        for mirror in self._all().values():
            mirror.set("certificate-days", f"{self._deps.certificate_days():g}".encode())

    def send_desired(self, device: str, signed: Signed) -> None:
        """Tell the regions to which a device may connect which release it should serve."""
        key = f"desired/{device}/{json.loads(signed.text)['release']['model']}"
        for region, mirror in self._all().items():
            if self.speaks_for(region, device):
                mirror.set(key, encode(signed))

    def send_parents(self, device: str, signed: Signed) -> None:
        """Tell the regions to which a device may or might connect where it may connect from now on."""
        for region, mirror in self._all().items():
            if self._concerns(region, signed):
                mirror.set(f"parents/{device}", encode(signed))

    async def attach(
        self, region: str, requests: AsyncIterable[pb.TierItem], write: Callable[[pb.TierItem], Awaitable[object]]
    ) -> None:
        """Serve one stream of a region until it ends; raises ProtocolError if a newer one of the region has begun."""
        mirror = await asyncio.to_thread(self._prepare, region)
        copy = self._copies.setdefault(region, MirrorCopy(functools.partial(self._take, region)))
        stream = self._streams[region] = object()
        copy.begin()
        event(_log, logging.INFO, "region.connected", region=region)

        async def read() -> None:
            async for item in requests:
                if self._streams.get(region) is not stream:
                    return
                copy.take(item)

        async def send() -> None:
            async for item in mirror.items():
                await write(item)

        try:
            await _first_end(read(), send())
            if self._streams.get(region) is not stream:
                raise ProtocolError(
                    f"another process has connected as region {region!r}. Two processes use copies of one --home: stop "
                    "one of them, and enrol it under another name, in another --home"
                )
        finally:
            if self._streams.get(region) is stream:
                del self._streams[region]
                copy.clear()  # its devices are offline, as far as this side knows
                event(_log, logging.INFO, "region.disconnected", region=region)

    def send_job(self, region: str, device: str, message: JobMessage) -> None:
        """Tell a region what one of its devices is asked, or that it is asked no longer."""
        if isinstance(message, Fit | Evaluate):
            with self._lock:
                regions = self._devices.setdefault((message.job, message.round), {})
                regions.setdefault(region, {})[device] = None
            self._tell(message.job, message.round, region)
        elif isinstance(message, Deliver):
            self._deliver(region, device, message)
        elif isinstance(message, RoundClosed):
            self._close(device, message)

    def send_command(self, region: str, device: str, command: Command) -> None:
        """Pass a command for a device to its region."""
        if (mirror := self._mirror(region)) is not None:
            mirror.set(f"command/{device}", encode(command))

    def _deliver(self, region: str, device: str, message: Deliver) -> None:
        """Pass a Flower app's message to a region that may have its device."""
        with self._lock:
            self._messages.setdefault((message.job, message.round), {})[region] = None
        if (mirror := self._mirror(region)) is not None:
            if message.job not in self._told_running:
                self.note_running()
            key = f"deliver/{message.job}/{message.round}"
            mirror.set(key, functools.partial(self._message, device, message))

    def _message(self, device: str, message: Deliver) -> bytes | None:
        """Return a message as it is now, called when it is sent; None if nobody waits for it."""
        opened = self._deps.rounds.get(message.job, message.round)
        if opened is None:
            return None
        return tiers.pack(Message(device=device, deliver=dataclasses.replace(message, deadline_s=opened.left_s())))

    def _close(self, device: str, closed: RoundClosed) -> None:
        """Take back what a device was asked: one round or message, or all of a relay that has ended."""
        self.withdraw(device, closed.job, closed.round)
        if closed.job_ended and closed.job in self._told_running:
            with self._lock:
                left = [number for job, number in self._messages if job == closed.job]
            for number in left:
                self._take_back(closed.job, number)
            self.note_running()

    def _take_back(self, relay: str, number: int) -> None:
        """No region has a message any more."""
        with self._lock:
            regions = self._messages.pop((relay, number), {})
        for region in regions:
            if (mirror := self._mirror(region)) is not None:
                mirror.delete(f"deliver/{relay}/{number}")

    def _ask_no_more(self, region: str, devices: Collection[str]) -> None:
        """A region is asked for the answers of these devices no more: they are not below it."""
        if not devices:
            return
        with self._lock:
            asked = [(key, regions[region]) for key, regions in self._devices.items()
                     if not regions.get(region, {}).keys().isdisjoint(devices)]  # fmt: skip
            for _, its in asked:
                for device in devices:
                    its.pop(device, None)
        for (job, number), _ in asked:
            self._tell(job, number, region)

    def withdraw(self, device: str, job: str, number: int) -> None:
        """No region is asked for this device's answer any more."""
        self._take_back(job, number)
        with self._lock:
            regions = self._devices.get((job, number), {})
            asked = [region for region, devices in regions.items() if device in devices]
            for region in asked:
                del regions[region][device]
        for region in asked:
            self._tell(job, number, region)

    def moved(self, device: str, region: str) -> None:
        """A device is now to be reached through `region`; empty = directly. Ask there for what it has not answered."""
        for opened in self._deps.rounds.waiting_for(device):
            assignment = opened.assignment
            with self._lock:
                regions = self._devices.get((assignment.job, assignment.round), {})
                has_message = region in self._messages.get((assignment.job, assignment.round), {})
                here = has_message or device in regions.get(region, {})
            if not here:
                if not isinstance(assignment, Deliver):  # the other region may still have the reply to a message
                    self.withdraw(device, assignment.job, assignment.round)
                if region and not opened.unreachable(region):
                    self.send_job(region, device, assignment)

    def close_round(self, job: str, number: int) -> None:
        """A round is over: no region is asked for anything of it."""
        self._take_back(job, number)
        with self._lock:
            self._told.pop((job, number), None)
            regions = list(self._devices.pop((job, number), {}))
        for region in regions:
            if (mirror := self._mirror(region)) is not None:
                mirror.delete(f"work/{job}/{number}")

    def speaks_for(self, region: str, device: str) -> bool:
        """Whether a device may be connected below a region."""
        with self._lock:
            return device in self._inside.get(region, ())

    def _prepare(self, region: str) -> Mirror:
        self.refresh()
        mirror = self._mirror(region)
        if mirror is None:
            raise ProtocolError(f"{region} is not a region below {self._deps.name}")
        mirror.set("running", functools.partial(self._running))
        mirror.set("certificate-days", f"{self._deps.certificate_days():g}".encode())
        with self._lock:
            devices = sorted(self._inside.get(region, ()))
        for opened in self._deps.rounds.all():
            assignment = opened.assignment  # the region may have answers of devices that are offline now
            if isinstance(assignment, Fit | Evaluate) and not opened.waiting().isdisjoint(devices):
                with self._lock:
                    self._devices.setdefault((assignment.job, assignment.round), {}).setdefault(region, {})
                self._tell(assignment.job, assignment.round, region)
            elif isinstance(assignment, Deliver) and (waiting := opened.waiting().intersection(devices)):
                self._deliver(region, min(waiting), assignment)
        desired = {}
        for device in devices:
            for signed in self._deps.desired_for(device):
                model = json.loads(signed.text)["release"]["model"]
                desired[f"desired/{device}/{model}"] = encode(signed)
        mirror.replace("desired/", {**desired})
        lists = {
            device: signed for device, signed in self._deps.parent_lists().items() if self._concerns(region, signed)
        }
        mirror.replace("parents/", {f"parents/{device}": encode(signed) for device, signed in lists.items()})
        return mirror

    def _concerns(self, region: str, signed: Signed) -> bool:
        """Whether a list of parents has, or had, a region or one below it."""
        with self._lock:
            return not regions_in(signed).isdisjoint({region, *self._inside.get(region, ())})

    def _take(self, region: str, key: str, value: bytes | None) -> None:
        """Take an entry that a region has set, or deleted (None)."""
        kind, _, rest = key.partition("/")
        name = rest.partition("/")[0]
        try:
            if name != region and value is not None and not self.speaks_for(region, name):
                fault = f"it speaks for {name[:80]!r}, which may not connect below it"
            elif kind == "region":
                fault = ""
                self._take_region(name, key, value)
            elif kind == "serial":
                fault = ""
                if value is not None:
                    self._deps.used(name, value.decode("ascii", "replace"))
            elif kind == "log":
                fault = ""
                self._take_log(region, name, key, value)
            elif kind in {"state", "telemetry", "note"}:
                fault = ""
                self._deps.heard(region, name, "rollout" if kind == "note" else kind, value or b"")
            else:
                fault = "an entry of an unknown kind"
        except ProtocolError as error:
            fault = str(error)
        if fault:
            event(_log, logging.WARNING, "region.bad_entry", region=region, key=key[:80], reason=fault)

    def _take_region(self, name: str, key: str, value: bytes | None) -> None:
        state = None if value is None else tiers.unpack(RegionState, value)
        with self._lock:
            if state is None:
                self._states.pop(name, None)
            else:
                self._states[name] = state
        self._deps.told(key, value)

    def _take_log(self, region: str, device: str, key: str, value: bytes | None) -> None:
        """Take the end of a device's log; the region needs to keep neither the command nor the log then."""
        if value is not None:
            if (mirror := self._mirror(region)) is not None:
                mirror.delete(f"command/{device}")
            self._deps.log(device, tiers.unpack(LogSent, value))
        self._deps.told(key, value)

    def _tell(self, job: str, number: int, region: str) -> None:
        if (mirror := self._mirror(region)) is not None:
            if job not in self._told_running:  # before its work, or the region believes that it has ended
                self.note_running()
            mirror.set(f"work/{job}/{number}", functools.partial(self._work, job, number, region))

    def _running(self) -> bytes:
        running = sorted(self._deps.running())
        self._told_running = set(running)
        return json.dumps(running).encode()

    def _work(self, job: str, number: int, region: str) -> bytes | None:
        """Return a region's work as it is now, called when it is sent; None if the round is over.

        A region asks its devices several times in one round: between two times nobody below is asked, but the regions
        below keep what they have.
        """
        opened = self._deps.rounds.get(job, number)
        with self._lock:
            devices = list(self._devices.get((job, number), {}).get(region, {}))
            told = self._told.get((job, number), {}).get(region)
        if opened is None or not isinstance(opened.assignment, Fit | Evaluate):
            if told is None or self._deps.is_over(job, number):
                return None
            return tiers.pack(dataclasses.replace(told, devices=[]))
        left_s, waiting = opened.left_s(), opened.waiting()
        asked = dataclasses.replace(opened.assignment, deadline_s=max(0.0, left_s - max(LEAD_S, LEAD_SHARE * left_s)))
        work = Work(
            fit=asked if isinstance(asked, Fit) else None,
            evaluate=asked if isinstance(asked, Evaluate) else None,
            devices=sorted(waiting.intersection(devices)),  # others have answered elsewhere
            offline_grace_s=opened.terms.offline_grace_s,
            region_rounds=opened.region_rounds,
        )
        with self._lock:
            self._told.setdefault((job, number), {})[region] = work
        return tiers.pack(work)

    def _mirror(self, region: str) -> Mirror | None:
        with self._lock:
            return self._mirrors.get(region)

    def _all(self) -> dict[str, Mirror]:
        with self._lock:
            return dict(self._mirrors)


async def _first_end(*both: Coroutine[Any, Any, None]) -> None:
    """Run both until one ends, and cancel the other; raises what the one raised."""
    tasks = [asyncio.ensure_future(one) for one in both]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
