"""Enrolment: a one-time token becomes a certificate, and a folder becomes an agent's home.

The token contains the fingerprint of the fleet's CA. The first connection fetches the CA's certificate unverified
and compares it with the fingerprint; all later ones use TLS with that CA. The device's private key is made here and
never leaves the device. Invariant: a failed enrolment leaves the home unchanged.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from edge_agent.link.profile import FILE, Profile, cloud_host, save_profile, with_host
from edgefl.errors import EnrolmentRefused, HomeError
from edgefl.process.home import create_home
from edgefl.protocols import tls
from edgefl.protocols.addresses import bracketed
from edgefl.protocols.enrolling import EnrolmentReply, apply_for_certificate
from edgefl.protocols.topics import valid_device_name


@dataclass(frozen=True, kw_only=True, slots=True)
class EnrolmentRequest:
    """The options of `edgefl agent enroll`."""

    cloud: str  # https://host:port
    token: str
    name: str
    tags: Mapping[str, str] = field(default_factory=dict)


def enroll(home: Path, request: EnrolmentRequest) -> Profile:
    """Enrol this device and create its home; raises EnrolmentRefused, CloudUnreachable, HomeError or ConfigError."""
    host = cloud_host(request.cloud)
    if not valid_device_name(request.name):
        raise EnrolmentRefused(f"--name {request.name!r} must be 1 to 64 of a-z 0-9 . _ - and not a reserved word")
    tls.parse_token(request.token)
    if (home / FILE).exists():
        raise HomeError(f"{home} is enrolled already; choose another --home, or delete it to enrol again")
    with ExitStack() as undo:
        new = not home.exists()
        create_home(home, "agent")
        if new:
            undo.callback(shutil.rmtree, home)
        with tempfile.TemporaryDirectory(prefix=".enroll-", dir=home) as folder:
            keys = tls.Identity.in_folder(Path(folder))
            reply = apply_for_certificate(request.cloud, request.token, request.name, request.tags, keys)
            profile = _profile(request, reply, host)
            _install(home, keys, reply)
        save_profile(home, profile)  # last: from here on the home is enrolled
        undo.pop_all()
    return profile


def _profile(request: EnrolmentRequest, reply: EnrolmentReply, host: str) -> Profile:
    try:
        broker = with_host(reply.broker, host)
    except ValueError as cause:
        raise EnrolmentRefused(f"{request.cloud} answered with an unusable broker URL: {cause}") from cause
    return Profile(
        device=request.name,
        cloud_url=request.cloud.rstrip("/"),
        grpc=f"{bracketed(host)}:{reply.grpc_port}",
        broker=broker,
        tags=request.tags,
        region=reply.server,
    )


def _install(home: Path, keys: tls.Identity, reply: EnrolmentReply) -> None:
    """Move the new files into the home; files of an interrupted attempt are overwritten."""
    keys.cert.write_text(reply.certificate, encoding="ascii")
    (keys.cert.parent / "fleet.pub").write_text(reply.fleet_key, encoding="ascii")
    for file in keys.cert.parent.iterdir():
        file.replace(home / file.name)
