"""Renews the agent's certificate when the cloud asks for it; the device's own clock is not used.

Then the channel and the MQTT link reconnect, and running transfers continue.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import grpc

from edge_agent.link.channel import CloudChannel
from edgefl.errors import HomeError, ParentLeft, ProtocolError
from edgefl.logs import event
from edgefl.protocols.certificates.own import install, next_request

_log = logging.getLogger(__name__)


class Renewal:
    """Renews one home's certificate."""

    def __init__(self, home: Path, device: str, channel: CloudChannel, reconnect: Callable[[], None]) -> None:
        self._home, self._device, self._channel, self._reconnect = home, device, channel, reconnect

    async def renew(self) -> bool:
        """Return whether there is a new certificate; if not, the log says why and the old one stays in use."""
        try:
            request = await asyncio.to_thread(next_request, self._home, self._device)
            reply = await self._channel.renew(request)
            await asyncio.to_thread(install, self._home, self._device, reply)
        except grpc.aio.AioRpcError as error:
            event(_log, logging.WARNING, "certificate.not_renewed", code=error.code().name, reason=error.details())
            return False
        except (ProtocolError, ParentLeft, HomeError, OSError, ValueError) as error:
            event(_log, logging.ERROR, "certificate.not_renewed", reason=error)
            return False
        await self._channel.reopen()
        self._reconnect()
        return True
