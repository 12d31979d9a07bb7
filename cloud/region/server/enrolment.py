"""How a machine becomes a region: a one-time token becomes a certificate, and a folder becomes a region's home.

The first connection is verified by the CA's fingerprint in the token, as a device's is. A region's certificate has one
name, NAME.region.edgefl.internal, and no address, so that it cannot pass for the cloud or for another region.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from edgefl.errors import ConfigError, EnrolmentRefused, HomeError, ProtocolError
from edgefl.process.home import check_home, create_home, replace_file
from edgefl.protocols import tls
from edgefl.protocols.addresses import bracketed
from edgefl.protocols.enrolling import apply_for_certificate
from edgefl.protocols.messages import from_json
from edgefl.protocols.topics import valid_device_name

FILE = "region.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionProfile:
    """A region's name, and where its parent is."""

    name: str
    parent_url: str  # https://host:port, where it enrolled
    parent_grpc: str  # host:port
    parent_name: str = tls.CLOUD_NAME  # of the cloud, or the region above

    @property
    def server_name(self) -> str:
        """The name in the parent's certificate; empty = its host's."""
        return "" if self.parent_name == tls.CLOUD_NAME else self.parent_name + tls.REGION_DOMAIN


def enroll_region(home: Path, parent: str, token: str, name: str) -> RegionProfile:
    """Enrol a region and create its home; return the profile of one that is enrolled already.

    Raises EnrolmentRefused, CloudUnreachable, HomeError, or ConfigError for a name or another parent than before.
    """
    if (home / FILE).exists():
        profile = load_profile(home)
        if (name and name != profile.name) or (parent and parent.rstrip("/") != profile.parent_url):
            raise ConfigError(
                f"{home} is the home of region {profile.name!r} below {profile.parent_url}; drop --name and --parent, "
                "or take another --home"
            )
        return profile
    host = urlsplit(parent).hostname
    if not parent.startswith("https://") or not host:
        raise ConfigError(f"--parent {parent!r} is not of the form https://host:port, where its parent is")
    if not valid_device_name(name):
        raise EnrolmentRefused(f"--name {name!r} must be 1 to 64 of a-z 0-9 . _ - and not a reserved word")
    if not token:
        raise EnrolmentRefused("--token is missing: make one with `edgefl cloud token --role region`")
    create_home(home, "region")
    folder = home / "tls"
    folder.mkdir(mode=0o700, exist_ok=True)
    keys = tls.Identity.in_folder(folder)
    reply = apply_for_certificate(parent, token, name, {}, keys, role="region")
    keys.cert.write_text(reply.certificate, encoding="ascii")
    (home / "fleet.pub").write_text(reply.fleet_key, encoding="ascii")
    profile = RegionProfile(
        name=name,
        parent_url=parent.rstrip("/"),
        parent_grpc=f"{bracketed(host)}:{reply.grpc_port}",
        parent_name=reply.server or tls.CLOUD_NAME,
    )
    replace_file(home / FILE, json.dumps(dataclasses.asdict(profile), indent=2).encode())
    return profile


def load_profile(home: Path) -> RegionProfile:
    """Read the profile of an enrolled home; raises HomeError if it is damaged, or has the certificate of another."""
    check_home(home, "region")
    path, cert = home / FILE, tls.Identity.in_folder(home / "tls").cert
    try:
        profile = from_json(RegionProfile, json.loads(path.read_text("utf-8")))
        path, certificate = cert, cert.read_bytes()
        owner, is_region = tls.common_name(certificate), tls.is_region(certificate)
    except (OSError, ValueError, ProtocolError) as cause:
        raise HomeError(f"{path} is damaged: {cause}. Restore it from a backup, or enrol anew") from cause
    if owner != profile.name or not is_region:
        raise HomeError(
            f"{cert} is the certificate of the {'region' if is_region else 'device'} {owner!r}, not of the region "
            f"{profile.name!r}. Restore it from a backup, or enrol the region in another --home with a token of "
            "`edgefl cloud token --role region`"
        )
    return profile
