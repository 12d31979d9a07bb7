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
class Application:
    """A device's request for enrolment."""

    cloud: str  # https://host:port
    token: str
    name: str
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """The cloud's answer to an enrolment: certificates and keys in PEM format, and addresses."""

    certificate: str = field(metadata=raw())
    ca: str = field(metadata=raw())
    fleet_key: str = field(metadata=raw())
    grpc_port: int = field(metadata=limited(least=1, most=65535))
    broker: str  # mqtts://host:port, or mqtts://:port for the host of --cloud


def enroll(home: Path, application: Application) -> Profile:
    """Make `home` an enrolled agent's; raises EnrolmentRefused, CloudUnreachable, HomeError or ConfigError."""
    host = cloud_host(application.cloud)
    if not valid_device_name(application.name):
        raise EnrolmentRefused(f"--name {application.name!r} must be 1 to 64 of a-z 0-9 . _ - and not a reserved word")
    secret, ca_fingerprint = tls.parse_token(application.token)
    if (home / FILE).exists():
        raise HomeError(f"{home} is enrolled already; choose another --home, or remove it to enrol anew")
    with ExitStack() as undo:
        new = not home.exists()
        create_home(home, "agent")
        if new:
            undo.callback(shutil.rmtree, home)
        with tempfile.TemporaryDirectory(prefix=".enroll-", dir=home) as folder:
            keys = tls.Identity.in_folder(Path(folder))
            admission = _apply(application, secret, ca_fingerprint, keys)
            profile = _profile(application, admission, host)
            _install(home, keys, admission)
        save_profile(home, profile)  # last: from here on the home is enrolled
        undo.pop_all()
    return profile


def _apply(application: Application, secret: str, ca_fingerprint: str, keys: tls.Identity) -> Admission:
    """Ask the cloud for a certificate, over TLS pinned to the token's CA."""
    _fetch_ca(application.cloud, ca_fingerprint, keys.ca)
    request = tls.new_request(keys, application.name).decode()
    body = {"secret": secret, "name": application.name, "tags": dict(application.tags), "csr": request}
    context = tls.client_context(keys.ca)
    answer = _call("POST", f"{application.cloud.rstrip('/')}/v1/enroll", verify=context, json=body)
    try:
        admission = from_json(Admission, answer.json())
        _check(admission, application.name, ca_fingerprint)
    except (ValueError, ProtocolError, ManifestRejected) as cause:
        raise EnrolmentRefused(f"{application.cloud} sent an invalid answer to the enrolment: {cause}") from cause
    return admission


def _fetch_ca(cloud: str, ca_fingerprint: str, path: Path) -> None:
    # Unverified on purpose: the fingerprint in the token is what tells whose CA this is.
    answer = _call("GET", f"{cloud.rstrip('/')}/v1/ca", verify=False)
    try:
        seen = tls.fingerprint(answer.content)
    except ValueError as cause:
        raise EnrolmentRefused(f"{cloud}/v1/ca did not answer with a certificate; is it an edgefl cloud?") from cause
    if seen != ca_fingerprint:
        raise EnrolmentRefused(
            f"{cloud} has the CA {seen[:16]}..., the token is for {ca_fingerprint[:16]}...: another server answers "
            "at that address, or the token is another fleet's. Ask for a new token and check --cloud."
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


def _check(admission: Admission, name: str, ca_fingerprint: str) -> None:
    certificate = admission.certificate.encode()
    if tls.common_name(certificate) != name:
        raise ProtocolError(f"its certificate names {tls.common_name(certificate)!r}, not {name!r}")
    if tls.fingerprint(admission.ca.encode()) != ca_fingerprint:
        raise ProtocolError("its CA is not the token's")
    load_public_key(admission.fleet_key.encode())


def _profile(application: Application, admission: Admission, host: str) -> Profile:
    try:
        broker = with_host(admission.broker, host)
    except ValueError as cause:
        raise EnrolmentRefused(f"{application.cloud} answered with a broker that cannot be used: {cause}") from cause
    return Profile(
        device=application.name,
        cloud_url=application.cloud.rstrip("/"),
        grpc=f"{bracketed(host)}:{admission.grpc_port}",
        broker=broker,
        tags=application.tags,
    )


def _install(home: Path, keys: tls.Identity, admission: Admission) -> None:
    """Move the new files into the home; files of an interrupted attempt are overwritten."""
    keys.cert.write_text(admission.certificate, encoding="ascii")
    (keys.cert.parent / "fleet.pub").write_text(admission.fleet_key, encoding="ascii")
    for file in keys.cert.parent.iterdir():
        file.replace(home / file.name)
