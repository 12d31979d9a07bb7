"""Where devices may connect: an ordered list of parents for each, signed by the fleet's key.

A list names the parents with their addresses, as the regions said last. It is made anew when the device is assigned
to other parents, or an address changes; then it is sent to the device, and to its regions, old and new. Devices that
were never assigned connect to the cloud alone, and have no list.
Invariant: of one device's lists, a later one has a higher sequence.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import socket
import threading
from collections.abc import Callable, Mapping, Sequence

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloud.state.store import devices, parent_lists, region_addresses
from edgefl.logs import event
from edgefl.protocols.addresses import bracketed
from edgefl.protocols.manifest import ParentAddress, Parents, sign, verify
from edgefl.protocols.messages import Signed, from_json
from edgefl.protocols.tiers import RegionState

_log = logging.getLogger(__name__)


class ParentLists:
    """The lists of one fleet. Methods may be called from any thread."""

    def __init__(
        self, engine: sa.Engine, key: Ed25519PrivateKey, cloud: ParentAddress, send: Callable[[str, Signed], None]
    ) -> None:
        self._engine, self._key, self._send = engine, key, send
        self._lock = threading.Lock()
        with engine.connect() as db:
            rows = db.execute(region_addresses.select()).mappings().all()
        self._addresses = {row["region"]: from_json(ParentAddress, row["address"]) for row in rows}
        self._addresses[cloud.name] = cloud

    def of(self, device: str) -> Signed | None:
        """Return a device's list; None if it was never assigned, or no address of its parents is known yet."""
        return self._renewed(device)

    def all(self) -> dict[str, Signed]:
        """Return the lists of all enrolled devices that have one."""
        assigned = sa.select(devices.c.name).where(devices.c.parents.is_not(sa.null()) & devices.c.role.is_(sa.null()))
        with self._engine.connect() as db:
            names = list(db.scalars(assigned))
        lists = {name: self._renewed(name) for name in names}
        return {name: signed for name, signed in lists.items() if signed is not None}

    def refresh(self) -> None:
        """Make and send the lists that have changed; called when devices were assigned."""
        self.all()

    def note_region(self, name: str, state: RegionState) -> None:
        """Take a region's addresses, as it says them itself."""
        address = address_of(name, state.host, state.http_port, state.grpc_port, f":{state.mqtt_port}")
        if self._addresses.get(name) == address:
            return
        row = {"region": name, "address": dataclasses.asdict(address)}
        with self._engine.begin() as db:
            db.execute(region_addresses.delete().where(region_addresses.c.region == name))
            db.execute(region_addresses.insert().values(row))
        self._addresses[name] = address
        self.refresh()

    def _renewed(self, device: str) -> Signed | None:
        """Return a device's list; if it differs from the last one, it is made and sent."""
        with self._lock:
            with self._engine.connect() as db:
                member = db.execute(
                    sa.select(devices.c.parents, devices.c.former_parents).where(devices.c.name == device)
                ).one_or_none()
                found = db.scalar(sa.select(parent_lists.c.signed).where(parent_lists.c.device == device))
            if member is None or member.parents is None:
                return None
            kept = None if found is None else from_json(Signed, found)
            before = None if kept is None else verify(kept, Parents, self._key.public_key())
            wanted = self._list(device, member.parents, member.former_parents or (), before)
            if wanted is None or (before is not None and _is_same(wanted, before)):
                return kept
            signed = sign(wanted, self._key)
            row = {"device": device, "sequence": wanted.sequence, "signed": dataclasses.asdict(signed)}
            with self._engine.begin() as db:
                db.execute(parent_lists.delete().where(parent_lists.c.device == device))
                db.execute(parent_lists.insert().values(row))
        event(_log, logging.INFO, "device.parents", device=device, sequence=wanted.sequence,
              parents=",".join(one.name for one in wanted.parents))  # fmt: skip
        self._send(device, signed)
        return signed

    def _list(
        self, device: str, assigned: Sequence[str], former: Sequence[str], before: Parents | None
    ) -> Parents | None:
        known = [self._addresses[name] for name in assigned if name in self._addresses]
        if not known:
            return None
        sequence = 1 if before is None else before.sequence + 1
        return Parents(device=device, sequence=sequence, parents=known, former=list(former))


def address_of(name: str, host: str, http_port: int, grpc_port: int, broker: str) -> ParentAddress:
    """Return where devices reach a parent at a host; `broker` is a URL, or `:port` at the same host."""
    reached = bracketed(reached_at(host))
    return ParentAddress(
        name=name, url=f"https://{reached}:{http_port}", grpc=f"{reached}:{grpc_port}",
        broker=f"mqtts://{reached}{broker}" if broker.startswith(":") else broker,
    )  # fmt: skip


def reached_at(host: str) -> str:
    """Return the name or address at which devices reach a server here that listens on `host`."""
    return socket.gethostname() if host in {"0.0.0.0", "::"} else host  # noqa: S104 - not bound


def _is_same(one: Parents, other: Parents) -> bool:
    return list(one.parents) == list(other.parents)


def regions_in(signed: Signed) -> set[str]:
    """Return the names of all parents in a list, which this reader cannot or need not verify; raises ValueError."""
    text: Mapping[str, list[object]] = json.loads(signed.text)
    parents = [one["name"] for one in text.get("parents", []) if isinstance(one, Mapping)]
    return {str(name) for name in [*parents, *text.get("former", [])]}
