"""Uploads the end of the agent's own log when the cloud asks for it; one request at a time, at most one per second."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import grpc

from edge_agent.link.channel import CloudChannel
from edgefl.errors import ParentLeft
from edgefl.logs import event
from edgefl.process.log_tail import LogTail, of_job, read_tail
from edgefl.protocols.messages import LogWanted

LOG_FILE = "agent.log"
PAUSE_S = 0.8

_log = logging.getLogger(__name__)


class LogSender:
    """Answers requests for the log in a home. Used in the agent's event loop."""

    def __init__(self, home: Path, channel: CloudChannel) -> None:
        self._path, self._channel = home / LOG_FILE, channel
        self._wanted: asyncio.Queue[LogWanted] = asyncio.Queue(1)

    def handle(self, wanted: LogWanted) -> None:
        """Take a request; one that comes too soon after others is ignored."""
        try:
            self._wanted.put_nowait(wanted)
        except asyncio.QueueFull:
            event(_log, logging.WARNING, "log.not_sent", request=wanted.request, reason="requests are too frequent")

    async def run(self) -> None:
        """Answer requests until cancelled."""
        while True:
            await self._answer(await self._wanted.get())
            await asyncio.sleep(PAUSE_S)  # so that requests cannot keep the device busy

    async def _answer(self, wanted: LogWanted) -> None:
        try:
            tail = await asyncio.to_thread(self._read, wanted)
            await self._channel.send_log(wanted.request, "\n".join(tail.lines).encode(), cut=tail.cut)
        except (OSError, ParentLeft, grpc.aio.AioRpcError) as error:
            event(_log, logging.WARNING, "log.not_sent", request=wanted.request, reason=error)
            return
        event(_log, logging.INFO, "log.sent", request=wanted.request, lines=len(tail.lines))

    def _read(self, wanted: LogWanted) -> LogTail:
        if wanted.job:
            return read_tail(self._path, wanted.lines, of_job(wanted.job))
        return read_tail(self._path, wanted.lines)
