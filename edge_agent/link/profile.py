"""The device's name and its cloud's addresses: `agent.json` in its home, written by enrolment.

Invariant: a home is enrolled if and only if it has an `agent.json`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from edgefl.errors import ConfigError, HomeError, ProtocolError
from edgefl.process.home import check_home, replace_file
from edgefl.protocols.addresses import bracketed, is_loopback
from edgefl.protocols.messages import from_json
from edgefl.protocols.tls import REGION_DOMAIN
from edgefl.terminal.text import is_safe

FILE = "agent.json"
SERVING_FILE = "serving"  # in the home: the URL of predictions, while they are served


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """A device's name and the addresses of its cloud."""

    device: str
    cloud_url: str  # https://host:9480, where it enrolled
    grpc: str  # host:port of the data plane
    broker: str  # mqtts://host:port
    tags: Mapping[str, str] = field(default_factory=dict)
    region: str = ""  # whose addresses these are; empty = the cloud's

    @property
    def server_name(self) -> str:
        """The name that the servers' certificates must have; empty = their host's."""
        return self.region + REGION_DOMAIN if self.region else ""

    @property
    def insecure(self) -> bool:
        """Whether this is a loopback trial without TLS."""
        return self.cloud_url.startswith("http://")


def load_profile(home: Path) -> Profile:
    """Read the profile of an enrolled home; raises HomeError if the home is not enrolled or damaged."""
    check_home(home, "agent")
    path = home / FILE
    if not path.exists():
        raise HomeError(f"{home} is not enrolled (no {FILE}); run `edgefl agent enroll --home {home} ...` again")
    try:
        return from_json(Profile, json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, ProtocolError) as cause:
        raise HomeError(f"{path} is damaged: {cause}. Restore it from a backup or enrol in another --home") from cause


def save_profile(home: Path, profile: Profile) -> None:
    """Write `agent.json` atomically."""
    replace_file(home / FILE, json.dumps(dataclasses.asdict(profile), indent=2).encode())


def cloud_host(cloud_url: str) -> str:
    """Return the host of a cloud URL; raises ConfigError for an invalid one.

    Plain http is for a trial on one machine: it is refused for any host but loopback.
    """
    parts = urlsplit(cloud_url)
    if parts.scheme not in {"https", "http"} or not parts.hostname:
        raise ConfigError(f"--cloud {cloud_url!r} is not of the form https://host:port")
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        raise ConfigError(f"--cloud {cloud_url!r}: http is for loopback only; use https://{parts.netloc}")
    return parts.hostname


def with_host(url: str, host: str) -> str:
    """Return a broker URL with an empty host filled in: mqtts://:8883 -> mqtts://host:8883."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as cause:
        raise ProtocolError(f"broker {url!r:.200} is not of the form mqtts://host:port: {cause}") from cause
    if parts.scheme not in {"mqtt", "mqtts"} or port is None or not is_safe(url):
        raise ProtocolError(f"broker {url!r:.200} is not of the form mqtts://host:port")
    if parts.hostname:
        return url
    return f"{parts.scheme}://{bracketed(host)}:{port}"


def with_broker(profile: Profile, url: str) -> Profile:
    """Return the profile with this broker URL from the cloud; an empty URL changes nothing."""
    if not url:
        return profile
    return dataclasses.replace(profile, broker=with_host(url, cloud_host(profile.cloud_url)))
