"""The gRPC channel to the cloud: mutual TLS, automatic reconnection.

`watch` reports each time the cloud becomes reachable. Uploads and downloads wait until the channel is ready, so a
restart of the cloud only costs time. The methods are declared here instead of using the generated stub, because
chunks are sent as raw bytes, without protobuf objects (see `edge_agent.link.transfer`).
Invariant: every gRPC channel opened here is closed before `CloudChannel.close` returns. Otherwise the event loop
could not shut down: it waits for gRPC's thread, which waits for the state watch of an open channel.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc

from edge_agent.link.profile import Profile
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols import tls
from edgefl.protocols.messages import ASSIGNMENTS
from edgefl.protocols.ports.client_channel import answered, close_after, open_channel
from edgefl.terminal.text import one_line

CALL_TIMEOUT_S = 20.0
MAX_REASON_CHARS = 2000
DEVICE_METADATA = "edgefl-device"  # the device's name, if there is no certificate
PARENTS_METADATA = "edgefl-parents-bin"  # with a refusal: where this device may connect instead

_SERVICE = "/edgefl.v1.Fleet"


class CloudChannel:
    """A channel to the cloud, and whether the cloud is reachable now."""

    def __init__(self, profile: Profile, home: Path) -> None:
        self._profile, self._home = profile, home
        self._metadata: Sequence[tuple[str, str]] = ()
        if profile.insecure:
            self._metadata = ((DEVICE_METADATA, profile.device),)
        self._reopened = asyncio.Event()
        self._former: dict[grpc.aio.Channel, asyncio.Task[None]] = {}  # replaced channels; each task closes one
        self.reachable = False
        self.on_change: Callable[[], None] = lambda: None  # called when `reachable` changes
        self._open()

    def _open(self) -> None:
        """Open the channel with the home's current certificate."""
        identity = None if self._profile.insecure else tls.Identity.in_folder(self._home)
        self._channel = open_channel(self._profile.grpc, identity, self._profile.server_name)
        self._calls: weakref.WeakSet[Any] = weakref.WeakSet()  # weak, so that gRPC cancels a call that nobody holds
        self._next: Any = self._channel.unary_unary(
            f"{_SERVICE}/Next", pb.NextRequest.SerializeToString, pb.NextReply.FromString
        )
        self._renew: Any = self._channel.unary_unary(
            f"{_SERVICE}/Renew", pb.RenewRequest.SerializeToString, pb.RenewReply.FromString
        )
        self._resume: Any = self._channel.unary_unary(
            f"{_SERVICE}/Resume", pb.UpdateKey.SerializeToString, pb.UploadState.FromString
        )
        self._send_log: Any = self._channel.unary_unary(
            f"{_SERVICE}/SendLog", pb.LogReport.SerializeToString, pb.LogReply.FromString
        )
        self._fail: Any = self._channel.unary_unary(
            f"{_SERVICE}/Fail", pb.FailureReport.SerializeToString, pb.FailureReply.FromString
        )
        self._download: Any = self._channel.unary_stream(
            f"{_SERVICE}/Download", pb.DownloadRequest.SerializeToString, None
        )
        self._upload: Any = self._channel.stream_unary(f"{_SERVICE}/Upload", None, pb.UploadState.FromString)

    async def reopen(self) -> None:
        """Switch to a new connection with the home's current certificate; running calls may finish on the old one."""
        former, calls = self._channel, self._calls
        self._open()
        self._reopened.set()
        task = asyncio.create_task(close_after(former, calls), name="former-channel")
        self._former[former] = task
        task.add_done_callback(lambda _: self._former.pop(former, None))

    async def switch(self, profile: Profile) -> None:
        """Connect to another parent; running calls end with ParentLeft."""
        former, calls = self._channel, list(self._calls)
        self._profile, self.reachable = profile, False
        self._open()
        self._reopened.set()
        for call in calls:
            call.cancel()
        await former.close(None)
        self.on_change()

    async def watch(self, on_reachable: Callable[[], None]) -> None:
        """Call `on_reachable` whenever the cloud becomes reachable; runs until cancelled."""
        while True:
            self._reopened.clear()
            state = self._channel.get_state(try_to_connect=True)
            ready = state is grpc.ChannelConnectivity.READY
            was, self.reachable = self.reachable, ready
            if ready and not was:
                on_reachable()
            if ready is not was:
                self.on_change()
            await self._changed(state)

    async def _changed(self, state: grpc.ChannelConnectivity) -> None:
        """Wait until the channel changes its state or is replaced."""
        changed = asyncio.ensure_future(self._channel.wait_for_state_change(state))
        reopened = asyncio.ensure_future(self._reopened.wait())
        try:
            await asyncio.wait((changed, reopened), return_when=asyncio.FIRST_COMPLETED)
            if not reopened.done():
                changed.result()  # raises if the channel is closed
        finally:
            changed.cancel()
            reopened.cancel()
            await asyncio.gather(changed, reopened, return_exceptions=True)

    async def next(
        self, agent_version: str, holding: Sequence[str] = (), timeout_s: float = CALL_TIMEOUT_S
    ) -> pb.NextReply:
        """Ask what this device should do now; `holding` lists the jobs whose data this device keeps."""
        request = pb.NextRequest(agent_version=agent_version, holding=holding, knows=ASSIGNMENTS)
        reply: pb.NextReply = await answered(
            self._begin(self._next(request, timeout=min(timeout_s, CALL_TIMEOUT_S), metadata=self._metadata))
        )
        return reply

    async def renew(self, request: pb.RenewRequest) -> pb.RenewReply:
        """Request a certificate for a new key."""
        reply: pb.RenewReply = await answered(
            self._begin(self._renew(request, timeout=CALL_TIMEOUT_S, metadata=self._metadata))
        )
        return reply

    async def resume(self, key: pb.UpdateKey) -> pb.UploadState:
        """Ask how much of an update the cloud has received."""
        state: pb.UploadState = await answered(
            self._begin(self._resume(key, timeout=CALL_TIMEOUT_S, metadata=self._metadata, wait_for_ready=True))
        )
        return state

    async def send_log(self, request: str, text: bytes, *, cut: bool) -> None:
        """Upload the end of this agent's log, as the cloud asked with this request."""
        report = pb.LogReport(request=request, text=text, cut=cut)
        await answered(self._begin(self._send_log(report, timeout=CALL_TIMEOUT_S, metadata=self._metadata)))

    async def fail(self, key: pb.UpdateKey, reason: str) -> None:
        """Report to the cloud that there will be no update for a round."""
        report = pb.FailureReport(key=key, reason=one_line(reason, MAX_REASON_CHARS))
        call = self._fail(report, timeout=CALL_TIMEOUT_S, metadata=self._metadata, wait_for_ready=True)
        await answered(self._begin(call))

    def download(self, sha256: str, offset: int) -> Any:
        """Start to download a blob; `read()` of the returned call returns the bytes of a `Chunk`."""
        request = pb.DownloadRequest(sha256=sha256, offset=offset)
        return self._begin(self._download(request, metadata=self._metadata, wait_for_ready=True))

    def upload(self) -> Any:
        """Start to upload an update; `write()` of the returned call takes the bytes of an `UploadChunk`."""
        return self._begin(self._upload(metadata=self._metadata, wait_for_ready=True))

    def _begin(self, call: Any) -> Any:
        """Register a call with its channel until it is done, and return it."""
        calls = self._calls
        calls.add(call)
        call.add_done_callback(calls.discard)
        return call

    async def close(self) -> None:
        """Close this channel and the replaced ones, and cancel their calls."""
        former = dict(self._former)
        for task in former.values():
            task.cancel()
        await asyncio.gather(*former.values(), return_exceptions=True)
        for channel in (*former, self._channel):  # a task that was cancelled before it started closed nothing
            await channel.close(None)
