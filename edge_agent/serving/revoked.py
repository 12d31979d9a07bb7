"""Keeps the fleet's list of revoked certificates (CRL), for a serving port that requires client certificates.

The list comes from the cloud's HTTPS plane (`GET /v1/crl`). It is fetched whenever the cloud becomes reachable and
every REFRESH_S, checked against the fleet's CA, and stored in the home. So an offline device continues to serve for
any length of time and refuses devices that were removed earlier; before the first list no certificate is refused.
A list that expires before the CA does is not accepted, since TLS refuses all clients under an expired list. CRL numbers
are not compared: TLS authenticates the cloud, and a cloud restored from a backup counts from a lower number again.
RFC 5280, sections 5 and 6.3.
Invariant: REVOKED_FILE in the home is a list signed by the fleet's CA.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path

import httpx
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from edge_agent.link.profile import Profile
from edge_agent.serving.access import REVOKED_FILE
from edgefl.errors import CloudRefused, ProtocolError
from edgefl.logs import event
from edgefl.process.home import replace_file
from edgefl.protocols import tls
from edgefl.protocols.backoff import Backoff

REFRESH_S = 300.0
FIRST_RETRY_S, MAX_RETRY_S = 5.0, 60.0  # after a failure; longer if the cloud is full
FETCH_S = 20.0
MAX_LIST_BYTES = 16 << 20  # a quarter of a million certificates
_BUSY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)

_log = logging.getLogger(__name__)


class RevokedList:
    """Keeps the list in one home up to date. `changed` is called in the event loop when the list has changed."""

    def __init__(self, home: Path, profile: Profile, changed: Callable[[], None]) -> None:
        self._path, self._ca = home / REVOKED_FILE, tls.Identity.in_folder(home).ca
        self.follow(profile)
        self._changed = changed
        self._wanted = asyncio.Event()
        self._backoff = Backoff(FIRST_RETRY_S, MAX_RETRY_S, profile.device)
        self._last_error = ""  # logged as a warning when it changes
        self._held = self._load()  # without its signature, which differs each time

    def follow(self, profile: Profile) -> None:
        """Fetch the list from this parent from now on."""
        self._url, self._server_name = f"{profile.cloud_url}/v1/crl", profile.server_name

    def refresh(self) -> None:
        """Fetch the list soon, because the cloud is reachable."""
        self._wanted.set()

    async def run(self) -> None:
        """Keep the list up to date until cancelled."""
        wait_s = REFRESH_S
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._wanted.wait()
            self._wanted.clear()
            wait_s = await self._refresh()

    async def _refresh(self) -> float:
        """Fetch the list and keep it; return how long to wait before the next time."""
        full = False
        try:
            async with asyncio.timeout(FETCH_S):
                fetched = await self._fetch()
            if await asyncio.to_thread(self._keep, fetched):
                self._changed()
        except (ProtocolError, CloudRefused, httpx.HTTPError, TimeoutError, OSError) as error:
            full = isinstance(error, CloudRefused) and error.status in _BUSY
            last, self._last_error = self._last_error, str(error) or type(error).__name__
            level = logging.WARNING if self._last_error != last else logging.DEBUG
            event(_log, level, "revoked.not_fetched", url=self._url, reason=self._last_error)
            return self._backoff.next_s(full=full)
        self._last_error = ""
        self._backoff.reset()
        return REFRESH_S

    async def _fetch(self) -> bytes:
        context = tls.client_context(self._ca, None, self._server_name)
        async with (
            httpx.AsyncClient(verify=context, timeout=FETCH_S, trust_env=False) as client,
            client.stream("GET", self._url) as answer,
        ):
            if answer.status_code != HTTPStatus.OK:
                raise CloudRefused(f"the cloud answered {answer.status_code}; expected 200", answer.status_code)
            fetched = bytearray()
            async for part in answer.aiter_bytes():
                fetched += part
                if len(fetched) > MAX_LIST_BYTES:
                    raise ProtocolError(f"the list has more than {MAX_LIST_BYTES} bytes")
            return bytes(fetched)

    def _keep(self, fetched: bytes) -> bool:
        """Check and store a list; return whether it has changed. Raises ProtocolError, OSError."""
        revoked = check_list(fetched, self._ca.read_bytes())
        if self._path.exists() and revoked.tbs_certlist_bytes == self._held:
            return False
        replace_file(self._path, revoked.public_bytes(serialization.Encoding.PEM))
        event(_log, logging.INFO, "revoked.kept", certificates=len(revoked))
        self._held = revoked.tbs_certlist_bytes
        return True

    def _load(self) -> bytes:
        """Return the content of the stored list. A damaged one is deleted, because TLS would refuse all clients."""
        try:
            return check_list(self._path.read_bytes(), self._ca.read_bytes()).tbs_certlist_bytes
        except FileNotFoundError:
            reason = "removed devices are accepted until the cloud answers"
            event(_log, logging.WARNING, "revoked.none_yet", reason=reason)
        except ProtocolError as error:
            event(_log, logging.ERROR, "revoked.damaged", path=self._path, reason=error)
            self._path.unlink()
        return b""


def check_list(pem: bytes, ca_pem: bytes) -> x509.CertificateRevocationList:
    """Parse a PEM list; raises ProtocolError unless this CA signed it and it is valid as long as the CA."""
    ca = tls.load_certificate(ca_pem)
    key = ca.public_key()
    try:
        revoked = x509.load_pem_x509_crl(pem)
    except ValueError as cause:
        raise ProtocolError(f"not a list of revoked certificates in PEM: {cause}") from cause
    if revoked.issuer != ca.subject or not isinstance(key, ec.EllipticCurvePublicKey):
        raise ProtocolError(
            f"the issuer is {revoked.issuer.rfc4514_string()!r}, not by {ca.subject.rfc4514_string()!r}"
        )
    try:
        signed = revoked.is_signature_valid(key)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # signed by another type of key
        signed = False
    if not signed:
        raise ProtocolError("the list of revoked certificates is not signed by this fleet's CA")
    end = revoked.next_update_utc
    if end is not None and end < ca.not_valid_after_utc:
        raise ProtocolError(
            f"the list expires on {end:%Y-%m-%d}, before its CA does ({ca.not_valid_after_utc:%Y-%m-%d})"
        )
    return revoked
