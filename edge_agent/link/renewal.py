"""Renews the agent's certificate when the cloud asks for it; the device's own clock is not used.

The new key is made here and kept in `next.key` until there is a certificate for it: after an interrupted attempt the
agent sends a request for the same key again, and the cloud returns the same certificate. Key and certificate are
replaced in one step; then the channel and the MQTT link reconnect, and running transfers continue.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature

from edge_agent.link.channel import CloudChannel
from edge_agent.link.pair import replace_pair
from edgefl.errors import HomeError, ParentLeft, ProtocolError
from edgefl.logs import event
from edgefl.process.home import replace_file
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols.tiers.renewing import signed_request
from edgefl.protocols.tls import Identity, common_name, expires, load_certificate, load_key, request_for, saved_key

NEXT_KEY = "next.key"

_log = logging.getLogger(__name__)


class Renewal:
    """Renews one home's certificate."""

    def __init__(self, home: Path, device: str, channel: CloudChannel, reconnect: Callable[[], None]) -> None:
        self._home, self._device, self._channel, self._reconnect = home, device, channel, reconnect

    async def renew(self) -> bool:
        """Return whether there is a new certificate; if not, the log says why and the old one stays in use."""
        try:
            request = await asyncio.to_thread(self._request)
            reply = await self._channel.renew(request)
            await asyncio.to_thread(self._install, bytes(reply.certificate), bytes(reply.ca))
        except grpc.aio.AioRpcError as error:
            event(_log, logging.WARNING, "certificate.not_renewed", code=error.code().name, reason=error.details())
            return False
        except (ProtocolError, ParentLeft, HomeError, OSError, ValueError) as error:
            event(_log, logging.ERROR, "certificate.not_renewed", reason=error)
            return False
        await self._channel.reopen()
        self._reconnect()
        return True

    def _request(self) -> pb.RenewRequest:
        """Return a request for the next key, signed with the present one: regions pass it on."""
        csr = request_for(saved_key(self._home / NEXT_KEY), self._device)
        held = Identity.in_folder(self._home)
        return signed_request(csr, held.cert.read_bytes(), load_key(held.key))

    def _install(self, certificate: bytes, ca: bytes) -> None:
        """Check the cloud's reply, then replace key, certificate and, if it was renewed too, the CA's certificate."""
        key, home = saved_key(self._home / NEXT_KEY), Identity.in_folder(self._home)
        held = load_certificate(home.ca.read_bytes())
        _check_certificate(certificate, self._device, held)
        if load_certificate(certificate).public_key() != key.public_key():
            raise ProtocolError("the cloud's certificate is not for this device's key")
        replace_pair(self._home, (self._home / NEXT_KEY).read_bytes(), certificate)
        (self._home / NEXT_KEY).unlink()
        event(_log, logging.INFO, "certificate.renewed", ends=f"{expires(certificate):%Y-%m-%d}")
        if ca and ca != home.ca.read_bytes():
            _check_ca(ca, held)
            replace_file(home.ca, ca)


def _check_certificate(certificate: bytes, device: str, ca: x509.Certificate) -> None:
    if common_name(certificate) != device:
        raise ProtocolError(f"the cloud's certificate names {common_name(certificate)!r}, not {device!r}")
    try:
        load_certificate(certificate).verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature) as cause:
        raise ProtocolError("the cloud's certificate was not signed by this fleet's CA") from cause


def _check_ca(ca_pem: bytes, held: x509.Certificate) -> None:
    """Refuse a new CA certificate unless it is for the key that this device trusts already."""
    ca = load_certificate(ca_pem)
    try:
        ca.verify_directly_issued_by(held)
    except (ValueError, TypeError, InvalidSignature) as cause:
        raise ProtocolError("the CA's new certificate is not signed by the CA") from cause
    if ca.public_key() != held.public_key():
        raise ProtocolError("the CA's new certificate is for another key; this device keeps the old certificate")
