"""Network checks of `edgefl agent doctor`: each opens one connection and explains its failure.

A probe checks the certificate's dates last, so that a device with a wrong clock reports the clock, not the cloud's
certificate. For the broker, only TLS is checked, because a second MQTT session with this device's name would disconnect
the agent. So `check_tls` shows that a service accepts our certificate, not that it accepts this device: it may check
the list of devices after TLS.
Invariant: every wait has a deadline.
"""

from __future__ import annotations

import contextlib
import datetime
import http.client
import json
import math
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from edgefl.protocols import tls
from edgefl.terminal.text import one_line

DEADLINE_S = 5.0
MAX_SHOWN_CHARS = 500  # of a server's text
REFUSAL_S = 0.3  # plus three round trips: time for a server to refuse our certificate
_NO_CHECK_TIME = ssl.VerifyFlags(0x200000)  # X509_V_FLAG_NO_CHECK_TIME, which Python's ssl has no name for
_EXPIRED, _NOT_YET = 10, 9  # X509_V_ERR_CERT_HAS_EXPIRED, X509_V_ERR_CERT_NOT_YET_VALID
_REFUSALS = {  # a server's reasons to refuse a client's certificate, as OpenSSL names them
    "UNKNOWN_CA": "of another fleet",
    "CERTIFICATE_EXPIRED": "expired",
    "CERTIFICATE_REVOKED": "revoked",
    "CERTIFICATE_REQUIRED": "missing",
    "BAD_CERTIFICATE": "damaged",
    "DECRYPT_ERROR": "of another fleet",
}
_SERVING = "serving port"
_SEE_LOG = "`journalctl -u edgefl-agent -n 50` shows why the serving process died."
_HERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - the address to reach a server that listens on all


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """The result of one check: what was seen, and what to do if it failed."""

    check: str
    state: str  # ok | warn | fail
    seen: str
    advice: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """The cloud's report about itself, and how far this clock is from the cloud's."""

    version: str
    ahead_s: float  # of this clock; NaN if the cloud sent no time
    ailing: str = ""  # the unhealthy parts of the cloud, and why


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """A service to check, and the certificate to present (None: a loopback trial without TLS)."""

    check: str
    host: str
    port: int
    identity: tls.Identity | None
    server_name: str = ""  # that its certificate must have; empty = the host

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def peer(check: str, address: str, identity: tls.Identity | None, server_name: str = "") -> Peer:
    """Return the peer at host:port or scheme://host:port."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    return Peer(
        check=check, host=parts.hostname or "", port=parts.port or 443, identity=identity, server_name=server_name
    )


def fetch_health(cloud: Peer, clock: Callable[[], float] = time.time) -> Health | Check:
    """Return the cloud's health, or a failed check with the reason."""
    try:
        connection = _http(cloud)
        try:
            started_s = clock()
            connection.request("GET", "/v1/health")
            answer = connection.getresponse()
            body = answer.read(1 << 16)
            here_s = (started_s + clock()) / 2
        finally:
            connection.close()
    except OSError as error:
        return explain(cloud, error)
    except http.client.HTTPException:
        return Check(
            check=cloud.check, state="fail", seen=f"{cloud} does not speak HTTP", advice="Check --cloud's port."
        )
    try:
        facts = json.loads(body)
        version = one_line(str(facts["version"]), MAX_SHOWN_CHARS)
        parts = {str(name): part for name, part in facts.get("parts", {}).items() if not part["ok"]}
        ailing = "; ".join(f"{name}: {part['reason']}" for name, part in parts.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        seen = f"{cloud} answers {answer.status}, but not like an edgefl cloud"
        return Check(check=cloud.check, state="fail", seen=seen, advice="Check the address of --cloud.")
    ahead_s = here_s - _seconds(facts.get("time"), answer.getheader("Date"))
    return Health(version=version, ahead_s=ahead_s, ailing=one_line(ailing, MAX_SHOWN_CHARS))


def check_tls(service: Peer) -> Check:
    """Check that a service accepts our certificate; in TLS 1.3 a refusal comes after the handshake, so wait for it."""
    started_s = time.monotonic()
    try:
        with socket.create_connection((service.host, service.port), DEADLINE_S) as raw:
            if service.identity is None:
                return Check(check=service.check, state="ok", seen=f"{service} answers, without TLS")
            with _context(service, service.identity).wrap_socket(raw, server_hostname=service.host) as connection:
                took_s = time.monotonic() - started_s
                connection.settimeout(min(DEADLINE_S, REFUSAL_S + 3 * took_s))
                is_closed = _is_closed_by_peer(connection)
                version = connection.version()
    except OSError as error:
        return explain(service, error)
    if is_closed:
        seen = f"{service} closes the connection without an error after receiving this device's certificate"
        advice = "See its log: it may be shutting down, or have reached its connection limit."
        return Check(check=service.check, state="fail", seen=seen, advice=advice)
    seen = f"{service} accepts this device's certificate, {version}, {1000 * took_s:.0f} ms"
    return Check(check=service.check, state="ok", seen=seen)


def explain(at: Peer, error: OSError) -> Check:
    """Explain a failed connection and what to do."""
    seen, advice = _meaning(at, error)
    return Check(check=at.check, state="fail", seen=seen, advice=advice)


def check_serving(url: str, device: str, identity: tls.Identity | None) -> Check:
    """Check that the running agent answers at the URL of predictions in its home."""
    parts = urlsplit(url)
    host = _HERE.get(parts.hostname or "", parts.hostname or "")
    try:
        with socket.create_connection((host, parts.port or 0), DEADLINE_S) as raw:
            connection = http.client.HTTPConnection(host, parts.port, timeout=DEADLINE_S)
            connection.sock = raw
            if parts.scheme == "https" and identity is not None:
                context = tls.client_context(identity.ca, identity)
                connection.sock = context.wrap_socket(raw, server_hostname=device + tls.DEVICE_DOMAIN)
            with contextlib.closing(connection):
                name, needs_token = _identify(connection)
    except (OSError, ValueError, AttributeError, http.client.HTTPException) as error:
        seen = f"the agent serves at {url}, which does not answer: {one_line(str(error), MAX_SHOWN_CHARS)}"
        return Check(check=_SERVING, state="fail", seen=seen, advice=_SEE_LOG)
    if needs_token:
        return Check(
            check=_SERVING, state="ok", seen=f"{url} serves this agent's predictions to clients with the token"
        )
    if "edgefl" in name:
        return Check(check=_SERVING, state="ok", seen=f"{url} serves this agent's predictions")
    seen = f"the agent serves at {url}, but {one_line(name, MAX_SHOWN_CHARS) or 'another program'} answers there"
    return Check(check=_SERVING, state="fail", seen=seen, advice=_free(parts.port or 0))


def check_port(port: int, *, agent_runs: bool) -> Check:
    """Check that the serving port is free, for an agent that is not running or not serving yet."""
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
        with contextlib.closing(connection):
            name, needs_token = _identify(connection)
    except ConnectionRefusedError:
        return Check(check=_SERVING, state="ok", seen=f"{port} is free")
    except TimeoutError:
        if agent_runs:
            seen = f"{port} accepts connections, but does not answer within {DEADLINE_S:g} s"
            return Check(check=_SERVING, state="fail", seen=seen, advice=_SEE_LOG)
        name = ""
    except (OSError, ValueError, AttributeError, http.client.HTTPException):
        name = ""
    else:
        if agent_runs and (needs_token or "edgefl" in name):
            return Check(check=_SERVING, state="ok", seen=f"{port} serves predictions, probably this agent's")
    seen = f"{port} is used by {one_line(name, MAX_SHOWN_CHARS) or 'another program'}"
    return Check(check=_SERVING, state="fail", seen=seen, advice=_free(port))


def _identify(connection: http.client.HTTPConnection) -> tuple[str, bool]:
    """Return the name that a server of predictions reports, and whether it requires a token."""
    connection.request("GET", "/v2")
    answer = connection.getresponse()
    needs_token = answer.status == http.HTTPStatus.UNAUTHORIZED and bool(answer.getheader("WWW-Authenticate"))
    return str(json.loads(answer.read(1 << 16)).get("name", "")), needs_token


def _free(port: int) -> str:
    return f"Stop it (`ss -ltnp 'sport = :{port}'` shows it), or give the agent another --serve-port."


def _http(cloud: Peer) -> http.client.HTTPConnection:
    if cloud.identity is None:
        return http.client.HTTPConnection(cloud.host, cloud.port, timeout=DEADLINE_S)
    context = tls.client_context(cloud.identity.ca, None, cloud.server_name)
    context.verify_flags |= _NO_CHECK_TIME
    return http.client.HTTPSConnection(cloud.host, cloud.port, timeout=DEADLINE_S, context=context)


def _context(service: Peer, identity: tls.Identity) -> ssl.SSLContext:
    context = tls.client_context(identity.ca, identity, service.server_name)
    context.set_alpn_protocols(["h2"])  # required by gRPC servers, ignored by brokers
    return context


def _is_closed_by_peer(connection: ssl.SSLSocket) -> bool:
    """Whether a server closes a new connection; raises OSError if it refuses the certificate."""
    try:
        return not connection.recv(1)
    except TimeoutError:
        return False  # accepted: an MQTT broker waits for our first message


def _meaning(at: Peer, error: OSError) -> tuple[str, str]:
    if isinstance(error, socket.gaierror):
        return f"the name {at.host!r} cannot be resolved", "Check this device's DNS, or enrol with the cloud's address."
    if isinstance(error, ConnectionRefusedError):
        return f"nothing listens on {at}", "Start the cloud, or check its ports."
    if isinstance(error, TimeoutError):
        return f"{at} did not answer within {DEADLINE_S:g} s", "Check the network and the firewalls on the way."
    if isinstance(error, ssl.SSLCertVerificationError):
        return _their_certificate(at, error)
    if isinstance(error, ssl.SSLError):
        return _our_certificate(at, error)
    return f"{at}: {error.strerror or error}", "Check the network, and whether another program uses that port."


def _their_certificate(at: Peer, error: ssl.SSLCertVerificationError) -> tuple[str, str]:
    if error.verify_code in {_EXPIRED, _NOT_YET}:
        when = "expired" if error.verify_code == _EXPIRED else "not yet valid"
        return f"the certificate of {at} is {when} by this device's clock", (
            "Set this device's clock; if it is right, restart the cloud, which renews its certificate."
        )
    if "mismatch" in error.verify_message or "not valid for" in error.verify_message:
        return f"the cloud's certificate does not name {at.host!r}", (
            f"Start the cloud with --host {at.host}, or enrol with a name that it has."
        )
    return f"{at} presents a certificate that this fleet's CA did not sign", (
        "Another fleet or an attacker answers there. Check the address; otherwise enrol with a new token."
    )


def _our_certificate(at: Peer, error: ssl.SSLError) -> tuple[str, str]:
    reason = error.reason or ""
    for word, meaning in _REFUSALS.items():
        if word in reason:
            return f"{at} refuses this device's certificate as {meaning}", "Enrol again, with a new token."
    return f"TLS with {at} failed ({reason or error})", "Check the port: is it an edgefl cloud's?"


def _seconds(stated: object, date_header: str | None) -> float:
    """Return a time in seconds since 1970, from a number, ISO 8601 or an HTTP date; NaN if there is none."""
    try:
        if isinstance(stated, int | float):
            return float(stated)
        if isinstance(stated, str):
            moment = datetime.datetime.fromisoformat(stated)
            return moment.replace(tzinfo=moment.tzinfo or datetime.UTC).timestamp()
        return parsedate_to_datetime(date_header).timestamp() if date_header else math.nan
    except (ValueError, OverflowError):
        return math.nan
