"""Enrolment: a one-time token becomes a certificate, and a folder becomes an agent's home.

The token contains the fingerprint of the fleet's CA. The first connection fetches the CA's certificate unverified
and compares it with the fingerprint; all later ones use TLS with that CA. The device's private key is made here and
never leaves the device. Invariant: a failed enrolment leaves the home unchanged.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from edge_agent.link.profile import FILE, Profile, cloud_host, save_profile, with_host
from edgefl.errors import CloudUnreachable, EnrolmentRefused, HomeError, ManifestRejected, ProtocolError
from edgefl.process.home import create_home
from edgefl.protocols import tls
from edgefl.protocols.addresses import bracketed, other_scheme
from edgefl.protocols.fields import from_json, limited, raw
from edgefl.protocols.manifest import load_public_key
from edgefl.protocols.topics import valid_device_name

TIMEOUT_S = 20.0
CUT_OFF_WAIT_S = 0.5
BUSY_ATTEMPTS, MAX_RETRY_AFTER_S = 6, 10.0  # while the cloud is too busy


@dataclass(frozen=True, kw_only=True, slots=True)
class EnrolmentRequest:
    """The options of `edgefl agent enroll`."""

    cloud: str  # https://host:port
    token: str
    name: str
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class EnrolmentReply:
    """The cloud's answer to an enrolment: certificates and keys in PEM format, and addresses."""

    certificate: str = field(metadata=raw())
    ca: str = field(metadata=raw())
    fleet_key: str = field(metadata=raw())
    grpc_port: int = field(metadata=limited(least=1, most=65535))
    broker: str  # mqtts://host:port, or mqtts://:port for the host of --cloud


def enroll(home: Path, request: EnrolmentRequest) -> Profile:
    """Enrol this device and create its home; raises EnrolmentRefused, CloudUnreachable, HomeError or ConfigError."""
    host = cloud_host(request.cloud)
    if not valid_device_name(request.name):
        raise EnrolmentRefused(f"--name {request.name!r} must be 1 to 64 of a-z 0-9 . _ - and not a reserved word")
    secret, ca_fingerprint = tls.parse_token(request.token)
    if (home / FILE).exists():
        raise HomeError(f"{home} is enrolled already; choose another --home, or delete it to enrol again")
    with ExitStack() as undo:
        new = not home.exists()
        create_home(home, "agent")
        if new:
            undo.callback(shutil.rmtree, home)
        with tempfile.TemporaryDirectory(prefix=".enroll-", dir=home) as folder:
            keys = tls.Identity.in_folder(Path(folder))
            reply = _apply(request, secret, ca_fingerprint, keys)
            profile = _profile(request, reply, host)
            _install(home, keys, reply)
        save_profile(home, profile)  # last: from here on the home is enrolled
        undo.pop_all()
    return profile


def _apply(request: EnrolmentRequest, secret: str, ca_fingerprint: str, keys: tls.Identity) -> EnrolmentReply:
    """Ask the cloud for a certificate, over TLS pinned to the token's CA."""
    _fetch_ca(request.cloud, ca_fingerprint, keys.ca)
    csr = tls.new_request(keys, request.name).decode()
    body = {"secret": secret, "name": request.name, "tags": dict(request.tags), "csr": csr}
    context = tls.client_context(keys.ca)
    answer = _call("POST", f"{request.cloud.rstrip('/')}/v1/enroll", verify=context, json=body)
    try:
        reply = from_json(EnrolmentReply, answer.json())
        _check(reply, request.name, ca_fingerprint)
    except (ValueError, ProtocolError, ManifestRejected) as cause:
        raise EnrolmentRefused(f"{request.cloud} sent an invalid answer to the enrolment: {cause}") from cause
    return reply


def _fetch_ca(cloud: str, ca_fingerprint: str, path: Path) -> None:
    # Unverified on purpose: the CA is verified by the fingerprint in the token.
    answer = _call("GET", f"{cloud.rstrip('/')}/v1/ca", verify=False)
    try:
        seen = tls.fingerprint(answer.content)
    except ValueError as cause:
        raise EnrolmentRefused(f"{cloud}/v1/ca did not answer with a certificate; is it an edgefl cloud?") from cause
    if seen != ca_fingerprint:
        raise EnrolmentRefused(
            f"{cloud} has the CA {seen[:16]}..., but the token is for {ca_fingerprint[:16]}...: another server answers "
            "at that address, or the token belongs to another fleet. Ask for a new token and check --cloud."
        )
    path.write_bytes(answer.content)


def _call(
    method: str, url: str, *, verify: Any, json: Any = None, wait: Callable[[float], None] = time.sleep
) -> httpx.Response:
    try:
        with httpx.Client(verify=verify, timeout=TIMEOUT_S, trust_env=False) as client:
            answer = _ask(lambda: client.request(method, url, json=json), wait)
    except httpx.HTTPError as cause:
        reason = str(cause).rstrip(".") or type(cause).__name__
        advice = other_scheme(url) or "Check --cloud, the network and the firewall."
        raise CloudUnreachable(f"{url} did not answer: {reason}. {advice}") from cause
    if answer.status_code >= 400:
        raise EnrolmentRefused(_error_text(answer))
    return answer


def _ask(send: Callable[[], httpx.Response], wait: Callable[[float], None]) -> httpx.Response:
    """Send a request; retry a few times if the cloud is busy or closes the connection to make room for others."""
    for _ in range(BUSY_ATTEMPTS - 1):
        try:
            answer = send()
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
            wait(CUT_OFF_WAIT_S)
            continue
        if answer.status_code not in {httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE}:
            return answer
        wait(_retry_after_s(answer))
    return send()


def _retry_after_s(answer: httpx.Response) -> float:
    """Return how long a busy cloud asks to wait, at most MAX_RETRY_AFTER_S."""
    text = answer.headers.get("retry-after", "")
    return min(MAX_RETRY_AFTER_S, float(text) if text.isdecimal() else 1.0)


def _error_text(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        return f"{answer.request.url} answered {answer.status_code} {answer.reason_phrase}"


def _check(reply: EnrolmentReply, name: str, ca_fingerprint: str) -> None:
    certificate = reply.certificate.encode()
    if tls.common_name(certificate) != name:
        raise ProtocolError(f"its certificate names {tls.common_name(certificate)!r}, not {name!r}")
    if tls.fingerprint(reply.ca.encode()) != ca_fingerprint:
        raise ProtocolError("its CA is not the one that the token names")
    load_public_key(reply.fleet_key.encode())


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
    )


def _install(home: Path, keys: tls.Identity, reply: EnrolmentReply) -> None:
    """Move the new files into the home; files of an interrupted attempt are overwritten."""
    keys.cert.write_text(reply.certificate, encoding="ascii")
    (keys.cert.parent / "fleet.pub").write_text(reply.fleet_key, encoding="ascii")
    for file in keys.cert.parent.iterdir():
        file.replace(home / file.name)
