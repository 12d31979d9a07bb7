"""Enrolment as a device or a region asks for it: a one-time token becomes a certificate.

The token contains the fingerprint of the fleet's CA. The first connection fetches the CA's certificate unverified
and compares it with the fingerprint; all later ones use TLS with that CA. The private key is made here and never
leaves the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from edgefl.errors import CloudUnreachable, EnrolmentRefused, ManifestRejected, ProtocolError
from edgefl.protocols import tls
from edgefl.protocols.addresses import other_scheme
from edgefl.protocols.fields import from_json, limited, raw
from edgefl.protocols.manifest import load_public_key

TIMEOUT_S = 20.0
CUT_OFF_WAIT_S = 0.5
BUSY_ATTEMPTS, MAX_RETRY_AFTER_S = 6, 10.0  # while the cloud is too busy


@dataclass(frozen=True, kw_only=True, slots=True)
class EnrolmentReply:
    """The cloud's answer to an enrolment: certificates and keys in PEM format, and addresses."""

    certificate: str = field(metadata=raw())
    ca: str = field(metadata=raw())
    fleet_key: str = field(metadata=raw())
    grpc_port: int = field(metadata=limited(least=1, most=65535))
    broker: str  # mqtts://host:port, or mqtts://:port for the host of --cloud
    server: str = ""  # the region that answered; empty = the cloud


def apply_for_certificate(
    cloud: str, token: str, name: str, tags: Mapping[str, str], keys: tls.Identity, role: str = "device"
) -> EnrolmentReply:
    """Ask a cloud or a region for a certificate, over TLS pinned to the token's CA; writes `keys.key` and `keys.ca`.

    Raises EnrolmentRefused, CloudUnreachable, ProtocolError for an invalid token.
    """
    secret, ca_fingerprint = tls.parse_token(token)
    server_name = _fetch_ca(cloud, ca_fingerprint, keys.ca)
    csr = tls.new_request(keys, name).decode()
    body = {"secret": secret, "name": name, "tags": dict(tags), "csr": csr, "role": role}
    context = tls.client_context(keys.ca, None, server_name)
    answer = _call("POST", f"{cloud.rstrip('/')}/v1/enroll", verify=context, json=body)
    try:
        reply = from_json(EnrolmentReply, answer.json())
        _check(reply, name, role, ca_fingerprint)
    except (ValueError, ProtocolError, ManifestRejected) as cause:
        raise EnrolmentRefused(f"{cloud} sent an invalid answer to the enrolment: {cause}") from cause
    return reply


def _fetch_ca(cloud: str, ca_fingerprint: str, path: Path) -> str:
    """Write the CA's certificate; return the name of the region that answers, empty for the cloud.

    Unverified on purpose: the CA is verified by the fingerprint in the token.
    """
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
    region = answer.headers.get("edgefl-region", "")
    return region + tls.REGION_DOMAIN if region else ""


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


def _check(reply: EnrolmentReply, name: str, role: str, ca_fingerprint: str) -> None:
    certificate = reply.certificate.encode()
    if tls.common_name(certificate) != name:
        raise ProtocolError(f"its certificate names {tls.common_name(certificate)!r}, not {name!r}")
    if role == "region" and not tls.is_region(certificate):
        raise ProtocolError(
            f"its certificate makes {name!r} a device: that cloud is of a version without regions. Update it, "
            f"`edgefl devices remove {name}`, and enrol the region again"
        )
    if tls.fingerprint(reply.ca.encode()) != ca_fingerprint:
        raise ProtocolError("its CA is not the one that the token names")
    load_public_key(reply.fleet_key.encode())
