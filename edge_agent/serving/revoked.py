"""The fleet's list of revoked certificates (CRL), kept for a serving port that asks clients for a certificate.

The cloud's HTTPS plane has it (`GET /v1/crl`). It is fetched whenever the cloud is reachable again and every
REFRESH_S in between, checked against the fleet's CA, and kept in the home. So a device that is offline serves on, for
as long as it may be, and refuses those who were removed before; until the first list, nobody is refused for that.
A list does not age: one that ends before the CA does is not taken, since TLS refuses everybody by a list that has
ended. Which of two lists is newer is not asked: TLS says that it is the cloud who gives it, and the numbers of a cloud
that was restored from a backup begin again lower. RFC 5280, sections 5 and 6.3.
Invariant: what lies in the home under REVOKED_FILE is a list that the fleet's CA has signed.
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
AGAIN_FIRST_S, AGAIN_LAST_S = 5.0, 60.0  # after a failure; more where the cloud has no place
FETCH_S = 20.0
MAX_LIST_BYTES = 16 << 20  # a quarter of a million certificates
_BUSY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)

_log = logging.getLogger(__name__)


class RevokedList:
    """Keeps the list in one home up to date. `changed` is called in the event loop when the list has changed."""

    def __init__(self, home: Path, profile: Profile, changed: Callable[[], None]) -> None:
        self._path, self._ca = home / REVOKED_FILE, tls.Identity.in_folder(home).ca
        self._url = f"{profile.cloud_url}/v1/crl"
        self._changed = changed
        self._wanted = asyncio.Event()
        self._backoff = Backoff(AGAIN_FIRST_S, AGAIN_LAST_S, profile.device)
        self._told = ""  # why there is no new list; each reason is logged once
        self._held = self._load()  # without its signature, which has other bytes each time that it is made

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
            told, self._told = self._told, str(error) or type(error).__name__
            level = logging.WARNING if self._told != told else logging.DEBUG
            event(_log, level, "revoked.not_fetched", url=self._url, reason=self._told)
            return self._backoff.next_s(full=full)
        self._told = ""
        self._backoff.reset()
        return REFRESH_S

    async def _fetch(self) -> bytes:
        context = tls.client_context(self._ca)
        async with (
            httpx.AsyncClient(verify=context, timeout=FETCH_S, trust_env=False) as client,
            client.stream("GET", self._url) as answer,
        ):
            if answer.status_code != HTTPStatus.OK:
                raise CloudRefused(f"the cloud answers {answer.status_code}; expected 200", answer.status_code)
            fetched = bytearray()
            async for part in answer.aiter_bytes():
                fetched += part
                if len(fetched) > MAX_LIST_BYTES:
                    raise ProtocolError(f"the list has more than {MAX_LIST_BYTES} bytes")
            return bytes(fetched)

    def _keep(self, fetched: bytes) -> bool:
        """Keep a list that is good; return whether it is another than before. Raises ProtocolError, OSError."""
        revoked = check_list(fetched, self._ca.read_bytes())
        if self._path.exists() and revoked.tbs_certlist_bytes == self._held:
            return False
        replace_file(self._path, revoked.public_bytes(serialization.Encoding.PEM))
        event(_log, logging.INFO, "revoked.kept", certificates=len(revoked))
        self._held = revoked.tbs_certlist_bytes
        return True

    def _load(self) -> bytes:
        """Return what the list in the home says. One that the disk has damaged is removed: TLS refuses all by it."""
        try:
            return check_list(self._path.read_bytes(), self._ca.read_bytes()).tbs_certlist_bytes
        except FileNotFoundError:
            reason = "removed devices are let in until the cloud answers"
            event(_log, logging.WARNING, "revoked.none_yet", reason=reason)
        except ProtocolError as error:
            event(_log, logging.ERROR, "revoked.damaged", path=self._path, reason=error)
            self._path.unlink()
        return b""


def check_list(pem: bytes, ca_pem: bytes) -> x509.CertificateRevocationList:
    """Return the list in a PEM text; raises ProtocolError unless this CA has signed it, to last as long as the CA."""
    ca = tls.load_certificate(ca_pem)
    key = ca.public_key()
    try:
        revoked = x509.load_pem_x509_crl(pem)
    except ValueError as cause:
        raise ProtocolError(f"not a list of revoked certificates in PEM: {cause}") from cause
    if revoked.issuer != ca.subject or not isinstance(key, ec.EllipticCurvePublicKey):
        raise ProtocolError(
            f"the list is by {revoked.issuer.rfc4514_string()!r}, not by {ca.subject.rfc4514_string()!r}"
        )
    try:
        signed = revoked.is_signature_valid(key)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # by a key of another kind
        signed = False
    if not signed:
        raise ProtocolError("the list of revoked certificates is not signed by this fleet's CA")
    end = revoked.next_update_utc
    if end is not None and end < ca.not_valid_after_utc:
        raise ProtocolError(f"the list ends on {end:%Y-%m-%d}, before its CA does ({ca.not_valid_after_utc:%Y-%m-%d})")
    return revoked
