"""Where this device may connect: the list of parents that the fleet's key signed, and the addresses of its enrolment.

The list is kept in the home (`parents.json`), so that it survives restarts. The addresses by which the device enrolled
stay in use beside those in the list: they worked once, whatever a cloud believes about its own name.
Invariant: only a list of this device with a valid signature is used, and never an older one than before.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_agent.link.profile import Profile
from edgefl.errors import ConfigError, HomeError, ManifestRejected, ProtocolError
from edgefl.logs import event
from edgefl.process.home import replace_file
from edgefl.protocols.link_config import parse_url
from edgefl.protocols.manifest import ParentAddress, Parents, load_public_key, verify
from edgefl.protocols.messages import Signed, decode, encode
from edgefl.protocols.tls import CLOUD_NAME

FILE = "parents.json"

_log = logging.getLogger(__name__)


class KnownParents:
    """The parents of one device. Used from one thread."""

    def __init__(self, home: Path, enrolled: Profile, fleet_key: Ed25519PublicKey) -> None:
        self._path, self._enrolled, self._key = home / FILE, enrolled, fleet_key
        self._list = self._load()

    @property
    def profiles(self) -> list[Profile]:
        """The addresses to try, in the order of the list. A parent may have two: of the list, and of the enrolment."""
        if self._list is None:
            return [self._enrolled]
        found: list[Profile] = []
        for address in self._list.parents:
            there = _profile(self._enrolled, address)
            own = [self._enrolled] if there.region == self._enrolled.region else []
            for one in (*own, there):
                if _addresses(one) not in map(_addresses, found):
                    found.append(one)
        return found

    def take(self, signed: Signed) -> bool:
        """Take a list that the fleet may have signed; return whether it is new.

        Raises ManifestRejected for another signature or device, ProtocolError for unusable addresses. An older list
        changes nothing.
        """
        new = verify(signed, Parents, self._key)
        if new.device != self._enrolled.device:
            raise ManifestRejected(f"the list of parents is for {new.device!r:.80}, not for {self._enrolled.device!r}")
        if self._list is not None and new.sequence <= self._list.sequence:
            if new.sequence < self._list.sequence:
                event(_log, logging.WARNING, "parents.older", sequence=new.sequence, has=self._list.sequence)
            return False
        check_addresses(new)
        replace_file(self._path, encode(signed))
        self._list = new
        event(_log, logging.INFO, "parents.new", sequence=new.sequence,
              parents=",".join(one.name for one in new.parents))  # fmt: skip
        return True

    def _load(self) -> Parents | None:
        """Return the list in the home. A damaged one is not used: the next answer to `Next` brings it again."""
        try:
            kept = verify(decode(Signed, self._path.read_bytes()), Parents, self._key)
            check_addresses(kept)
        except FileNotFoundError:
            return None
        except (OSError, ProtocolError, ManifestRejected) as error:
            event(_log, logging.ERROR, "parents.damaged", path=self._path, reason=error)
            return None
        return kept if kept.device == self._enrolled.device else None


def check_addresses(parents: Parents) -> None:
    """Raise ProtocolError unless every address in a list can be used with TLS."""
    if not parents.parents:
        raise ProtocolError("the list of parents is empty")
    for one in parents.parents:
        try:
            web, grpc = urlsplit(one.url), urlsplit(f"//{one.grpc}")
            usable = web.scheme == "https" and web.hostname and web.port and grpc.hostname and grpc.port
            secure = parse_url(one.broker)[2]
        except (ValueError, ConfigError) as cause:
            raise ProtocolError(f"the addresses of parent {one.name!r} cannot be used: {cause}") from cause
        if not usable or not secure:
            raise ProtocolError(
                f"the addresses of parent {one.name!r} are {one.url}, {one.grpc}, {one.broker}; expected "
                "https://host:port, host:port, mqtts://host:port"
            )


def parent_name(profile: Profile) -> str:
    """Return the name of the parent whose addresses these are."""
    return profile.region or CLOUD_NAME


def listed_names(home: Path) -> list[str]:
    """Return the names in a home's list without checking it, for people to read; empty if there is none."""
    try:
        text = json.loads(decode(Signed, (home / FILE).read_bytes()).text)
        return [str(one["name"]) for one in text["parents"]]
    except (OSError, ProtocolError, ValueError, KeyError, TypeError):
        return []


def load_fleet_key(home: Path) -> Ed25519PublicKey:
    """Return the fleet's key in a home; raises HomeError."""
    path = home / "fleet.pub"
    try:
        return load_public_key(path.read_bytes())
    except (OSError, ValueError, ManifestRejected) as cause:
        raise HomeError(
            f"{path} cannot be read as the fleet's key: {cause}. Restore it from a backup or enrol in another --home"
        ) from cause


def _profile(enrolled: Profile, at: ParentAddress) -> Profile:
    region = "" if at.name == CLOUD_NAME else at.name
    return dataclasses.replace(enrolled, cloud_url=at.url.rstrip("/"), grpc=at.grpc, broker=at.broker, region=region)


def _addresses(profile: Profile) -> tuple[str, str, str]:
    return profile.region, profile.cloud_url, profile.grpc
