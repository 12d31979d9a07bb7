"""What a region knows of the fleet: who may connect, which certificates are revoked, what devices should serve.

Its parent tells it, entry by entry; the entries are kept in a file, so that a region that starts without its parent
serves its devices all the same.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgefl.errors import HomeError, ProtocolError
from edgefl.process.home import replace_file
from edgefl.protocols import tiers
from edgefl.protocols.fields import parse_json
from edgefl.protocols.messages import Signed, decode, encode
from edgefl.protocols.tiers import Member

FILE = "fleet.json"


@dataclass(frozen=True, slots=True)
class CutOff:
    """A device whose connections end: it belongs elsewhere, or was enrolled anew."""

    device: str
    is_moved: bool = False  # the top decides what becomes of its round: it may be below another region, or removed


class RegionMembership:
    """The members below one region. Methods may be called from any thread."""

    def __init__(self, home: Path, region: str) -> None:
        self._path, self._region = home / FILE, region
        self._lock = threading.RLock()
        self._members: dict[str, Member] = {}
        self._desired: dict[str, dict[str, Signed]] = {}
        self._parents: dict[str, Signed] = {}
        self._certificate_days = 0.0  # 0 = not told yet
        self._crl = b""
        self._running: list[str] = []
        self.changed: list[Callable[[], object]] = []  # called after each change of the members
        if self._path.exists():
            self._load()

    def members(self) -> Mapping[str, Member]:
        """Return every member below this region by its name."""
        with self._lock:
            return dict(self._members)

    def is_known(self, name: str, serial: str | None = None) -> bool:
        """Whether a device or region may connect here, with the certificate of this serial number."""
        with self._lock:
            member = self._members.get(name)
        if member is None or self._region not in member.parents:
            return False
        return serial is None or serial in member.serials

    def uses_next(self, name: str, serial: str | None) -> bool:
        """Whether this serial number is of a renewed certificate whose use the top has not confirmed yet."""
        with self._lock:
            member = self._members.get(name)
        return member is not None and serial in member.serials[1:]

    def has_next(self, name: str) -> bool:
        """Whether a device has a renewed certificate whose use the top has not confirmed yet."""
        with self._lock:
            member = self._members.get(name)
        return member is not None and len(member.serials) > 1

    def is_device(self, name: str) -> bool:
        """Whether a name is that of a device below this region."""
        with self._lock:
            member = self._members.get(name)
        return member is not None and not member.is_region

    def crl(self) -> bytes:
        """Return the list of revoked certificates (PEM); empty before the parent has sent one."""
        with self._lock:
            return self._crl

    def desired_for(self, device: str) -> list[Signed]:
        """Return the signed documents of the releases that a device should serve."""
        with self._lock:
            return list(self._desired.get(device, {}).values())

    def parents_for(self, device: str) -> Signed | None:
        """Return where a device may connect, also one that may not connect here any more; None = only here."""
        with self._lock:
            return self._parents.get(device)

    def parent_lists(self) -> Mapping[str, Signed]:
        """Return where each device may connect."""
        with self._lock:
            return dict(self._parents)

    def certificate_days(self) -> float:
        """Return how long new certificates of the fleet are valid; 0 before the parent has said it."""
        with self._lock:
            return self._certificate_days

    def running(self) -> list[str]:
        """Return the jobs that have not ended, as far as this region knows."""
        with self._lock:
            return list(self._running)

    def take(self, key: str, value: bytes | None) -> CutOff | None:
        """Take an entry of the parent's; return the device whose connections end, if any. Raises ProtocolError."""
        kind, _, rest = key.partition("/")
        cut = None
        with self._lock:
            if kind == "member":
                cut = self._take_member(rest, value)
            elif kind == "desired":
                self._take_desired(rest, value)
            elif kind == "parents":
                self._take_parents(rest, value)
            elif kind == "certificate-days":
                self._certificate_days = _days(value)
            elif kind == "revoked":
                self._crl = _ascii(value or b"")
            elif kind == "running":
                self._running = _names(value or b"[]")
            else:
                raise ProtocolError(f"an entry {key[:80]!r} of an unknown kind; update this region")
            self._save()
        if kind == "member":
            for call in self.changed:
                call()
        return cut

    # The caller has the lock.

    def _take_member(self, name: str, value: bytes | None) -> CutOff | None:
        member = None if value is None else tiers.unpack(Member, value)
        former = self._members.pop(name, None)
        if member is None:
            return CutOff(name, is_moved=True) if former is not None else None
        self._members[name] = member
        if former is None:
            return None
        if not {*former.serials} & {*member.serials}:
            return CutOff(name)
        is_moved = self._region in former.parents and self._region not in member.parents
        return CutOff(name, is_moved=True) if is_moved else None

    def _take_desired(self, key: str, value: bytes | None) -> None:
        device, _, model = key.partition("/")
        signed = None if value is None else decode(Signed, value)
        releases = self._desired.setdefault(device, {})
        if signed is None:
            releases.pop(model, None)
        else:
            releases[model] = signed

    def _take_parents(self, device: str, value: bytes | None) -> None:
        if value is None:
            self._parents.pop(device, None)
        else:
            self._parents[device] = decode(Signed, value)

    def _save(self) -> None:
        kept = {
            "members": {name: json.loads(tiers.pack(one)) for name, one in self._members.items()},
            "desired": {
                device: {model: json.loads(encode(signed)) for model, signed in releases.items()}
                for device, releases in self._desired.items()
            },
            "parents": {device: json.loads(encode(signed)) for device, signed in self._parents.items()},
            "certificate_days": self._certificate_days,
            "crl": self._crl.decode("ascii"),
            "running": self._running,
        }
        replace_file(self._path, json.dumps(kept).encode())

    def _load(self) -> None:
        try:
            kept = json.loads(self._path.read_text("utf-8"))
            self._members = {
                name: tiers.unpack(Member, json.dumps(one).encode()) for name, one in kept["members"].items()
            }
            self._desired = {
                device: {model: decode(Signed, json.dumps(one).encode()) for model, one in releases.items()}
                for device, releases in kept["desired"].items()
            }
            parents = kept.get("parents", {}).items()
            self._parents = {device: decode(Signed, json.dumps(one).encode()) for device, one in parents}
            self._certificate_days = float(kept.get("certificate_days", 0.0))
            self._crl = str(kept["crl"]).encode("ascii")
            self._running = [str(job) for job in kept["running"]]
        except (ValueError, KeyError, TypeError, AttributeError, ProtocolError) as cause:
            raise HomeError(
                f"{self._path} is damaged: {cause!r:.200}. Delete it: the parent sends it again when it is connected"
            ) from cause


def _ascii(value: bytes) -> bytes:
    if not value.isascii():
        raise ProtocolError("the list of revoked certificates is not PEM")
    return value


def _names(value: bytes) -> list[str]:
    names = parse_json(value)
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
        raise ProtocolError("the running jobs are not a list of names")
    return names


def _days(value: bytes | None) -> float:
    try:
        days = float(value or b"0")
    except ValueError as cause:
        raise ProtocolError(f"certificates are valid for {value!r:.40} days: expected a number") from cause
    if not 0 <= days < math.inf:
        raise ProtocolError(f"certificates are valid for {days} days: expected 0 or more")
    return days
