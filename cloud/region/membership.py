"""What a region knows of the fleet: who may connect, which certificates are revoked, what devices should serve.

Its parent tells it, entry by entry; the entries are kept in a file, so that a region that starts without its parent
serves its devices all the same.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from edgefl.errors import ProtocolError
from edgefl.process.home import replace_file
from edgefl.protocols import tiers
from edgefl.protocols.messages import Signed, decode, encode
from edgefl.protocols.tiers import Member

FILE = "fleet.json"


class RegionMembership:
    """The members below one region. Methods may be called from any thread."""

    def __init__(self, home: Path, region: str) -> None:
        self._path, self._region = home / FILE, region
        self._lock = threading.RLock()
        self._members: dict[str, Member] = {}
        self._desired: dict[str, dict[str, Signed]] = {}
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

    def running(self) -> list[str]:
        """Return the jobs that have not ended, as far as this region knows."""
        with self._lock:
            return list(self._running)

    def take(self, key: str, value: bytes | None) -> str:
        """Take an entry of the parent's; return the device that was removed, if any. Raises ProtocolError."""
        kind, _, rest = key.partition("/")
        removed = ""
        with self._lock:
            if kind == "member" and value is None:
                former = self._members.pop(rest, None)
                removed = rest if former is not None else ""
            elif kind == "member" and value is not None:
                former, self._members[rest] = self._members.get(rest), tiers.unpack(Member, value)
                if former is not None and not {*former.serials} & {*self._members[rest].serials}:
                    removed = rest  # it was enrolled anew: connections with its old certificate end
            elif kind == "desired":
                device, _, model = rest.partition("/")
                releases = self._desired.setdefault(device, {})
                if value is None:
                    releases.pop(model, None)
                else:
                    releases[model] = decode(Signed, value)
            elif kind == "revoked":
                self._crl = value or b""
            elif kind == "running":
                self._running = [str(one) for one in json.loads(value or b"[]")]
            else:
                raise ProtocolError(f"an entry {key[:80]!r} of an unknown kind; update this region")
            self._save()
        if kind == "member":
            for call in self.changed:
                call()
        return removed

    def _save(self) -> None:
        kept = {
            "members": {name: json.loads(tiers.pack(one)) for name, one in self._members.items()},
            "desired": {
                device: {model: json.loads(encode(signed)) for model, signed in releases.items()}
                for device, releases in self._desired.items()
            },
            "crl": self._crl.decode("ascii"),
        }
        replace_file(self._path, json.dumps(kept).encode())

    def _load(self) -> None:
        kept = json.loads(self._path.read_text("utf-8"))
        self._members = {name: tiers.unpack(Member, json.dumps(one).encode()) for name, one in kept["members"].items()}
        self._desired = {
            device: {model: decode(Signed, json.dumps(one).encode()) for model, one in releases.items()}
            for device, releases in kept["desired"].items()
        }
        self._crl = str(kept["crl"]).encode("ascii")
