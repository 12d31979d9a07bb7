"""The one gRPC channel to the cloud, mutual TLS, which reconnects by itself.

`watch` says each time that the cloud becomes reachable. Calls wait for the channel to be ready, so
that a restart of the cloud shows as latency. The methods are named here rather than by the generated
stub, because chunks travel as raw bytes, without protobuf objects: see `edge_agent.link.transfer`.
Invariant: every gRPC channel that is opened here is closed before `CloudChannel.close` returns. The end of an
event loop waits for gRPC's own thread, and that one for whatever is watched on a channel that is not closed.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc

from edge_agent.link.profile import Profile
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols import tls
from edgefl.protocols.messages import ASSIGNMENTS
from edgefl.terminal.text import one_line

CALL_TIMEOUT_S = 20.0
TRANSFER_S = 120.0  # for transfers over a connection that is to end; those that take longer go on over the new one
MAX_REASON_CHARS = 2000
DEVICE_METADATA = "edgefl-device"  # who we are where no certificate says it

_SERVICE = "/edgefl.v1.Fleet"
_MAX_MESSAGE_BYTES = 16 << 20
_OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    # A restarted cloud is found again within a second or two; jitter of 20% is gRPC's own.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1500),
    # During calls only: `Next` is one, so that a dead path shows, and an idle device stays silent.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.enable_http_proxy", 0),
    ("grpc.http2.max_frame_size", 1 << 20),
)


class CloudChannel:
    """A channel, and whether the cloud is reachable over it now."""

    def __init__(self, profile: Profile, home: Path) -> None:
        self._profile, self._home = profile, home
        self._metadata: Sequence[tuple[str, str]] = ()
        if profile.insecure:
            self._metadata = ((DEVICE_METADATA, profile.device),)
        self._reopened = asyncio.Event()
        self._former: dict[grpc.aio.Channel, asyncio.Task[None]] = {}  # each ends when its calls have
        self.reachable = False
        self._open()

    def _open(self) -> None:
        """Open the channel, with the certificate that is in the home now."""
        if self._profile.insecure:
            self._channel = grpc.aio.insecure_channel(self._profile.grpc, options=_OPTIONS)
        else:
            credentials = tls.grpc_channel_credentials(tls.Identity.in_folder(self._home))
            self._channel = grpc.aio.secure_channel(self._profile.grpc, credentials, options=_OPTIONS)
        self._calls: weakref.WeakSet[Any] = weakref.WeakSet()  # under way over this channel; one let go of is cancelled
        self._next: Any = self._channel.unary_unary(
            f"{_SERVICE}/Next", pb.NextRequest.SerializeToString, pb.NextReply.FromString
        )
        self._renew: Any = self._channel.unary_unary(
            f"{_SERVICE}/Renew", pb.RenewRequest.SerializeToString, pb.RenewReply.FromString
        )
        self._resume: Any = self._channel.unary_unary(
            f"{_SERVICE}/Resume", pb.UpdateKey.SerializeToString, pb.UploadState.FromString
        )
        self._fail: Any = self._channel.unary_unary(
            f"{_SERVICE}/Fail", pb.FailureReport.SerializeToString, pb.FailureReply.FromString
        )
        self._download: Any = self._channel.unary_stream(
            f"{_SERVICE}/Download", pb.DownloadRequest.SerializeToString, None
        )
        self._upload: Any = self._channel.stream_unary(f"{_SERVICE}/Upload", None, pb.UploadState.FromString)

    async def reopen(self) -> None:
        """Go on over a new connection, with the certificate that is in the home now; calls under way end first."""
        former, calls = self._channel, self._calls
        self._open()
        self._reopened.set()
        task = asyncio.create_task(_close_after(former, calls), name="former-channel")
        self._former[former] = task
        task.add_done_callback(lambda _: self._former.pop(former, None))

    async def watch(self, on_reachable: Callable[[], None]) -> None:
        """Call back whenever the cloud becomes reachable; runs until cancelled."""
        while True:
            self._reopened.clear()
            state = self._channel.get_state(try_to_connect=True)
            ready = state is grpc.ChannelConnectivity.READY
            if ready and not self.reachable:
                self.reachable = True
                on_reachable()
            self.reachable = ready
            await self._changed(state)

    async def _changed(self, state: grpc.ChannelConnectivity) -> None:
        """Wait until the channel has another state, or is another channel."""
        changed = asyncio.ensure_future(self._channel.wait_for_state_change(state))
        reopened = asyncio.ensure_future(self._reopened.wait())
        try:
            await asyncio.wait((changed, reopened), return_when=asyncio.FIRST_COMPLETED)
            if not reopened.done():
                changed.result()  # raises where the channel is closed
        finally:
            changed.cancel()
            reopened.cancel()
            await asyncio.gather(changed, reopened, return_exceptions=True)

    async def next(self, agent_version: str, holding: Sequence[str] = ()) -> pb.NextReply:
        """Ask what this device should do now; `holding` are the jobs of which it keeps a state."""
        request = pb.NextRequest(agent_version=agent_version, holding=holding, knows=ASSIGNMENTS)
        reply: pb.NextReply = await self._begin(self._next(request, timeout=CALL_TIMEOUT_S, metadata=self._metadata))
        return reply

    async def renew(self, request: bytes) -> pb.RenewReply:
        """Ask for a certificate for a new key."""
        message = pb.RenewRequest(csr=request)
        reply: pb.RenewReply = await self._begin(self._renew(message, timeout=CALL_TIMEOUT_S, metadata=self._metadata))
        return reply

    async def resume(self, job: str, number: int) -> pb.UploadState:
        """Ask how much of an update the cloud holds."""
        key = pb.UpdateKey(job=job, round=number)
        state: pb.UploadState = await self._begin(
            self._resume(key, timeout=CALL_TIMEOUT_S, metadata=self._metadata, wait_for_ready=True)
        )
        return state

    async def fail(self, job: str, number: int, reason: str) -> None:
        """Tell the cloud that no update will come for a round."""
        report = pb.FailureReport(key=pb.UpdateKey(job=job, round=number), reason=one_line(reason, MAX_REASON_CHARS))
        await self._begin(self._fail(report, timeout=CALL_TIMEOUT_S, metadata=self._metadata, wait_for_ready=True))

    def download(self, sha256: str, offset: int) -> Any:
        """Begin to read a blob: a call whose `read()` returns the bytes of a `Chunk`."""
        request = pb.DownloadRequest(sha256=sha256, offset=offset)
        return self._begin(self._download(request, metadata=self._metadata, wait_for_ready=True))

    def upload(self) -> Any:
        """Begin to send an update: a call whose `write()` takes the bytes of an `UploadChunk`."""
        return self._begin(self._upload(metadata=self._metadata, wait_for_ready=True))

    def _begin(self, call: Any) -> Any:
        """Count a call among those of its channel until it ends, and return it."""
        calls = self._calls
        calls.add(call)
        call.add_done_callback(calls.discard)
        return call

    async def close(self) -> None:
        """Close the channel, those before it too, and end their calls."""
        former = dict(self._former)
        for task in former.values():
            task.cancel()
        await asyncio.gather(*former.values(), return_exceptions=True)
        for channel in (*former, self._channel):  # a task that was cancelled before it began has closed nothing
            await channel.close(None)


async def _close_after(channel: grpc.aio.Channel, calls: Iterable[Any]) -> None:
    """Close a channel once its calls have ended or their time is over; at once where this is cancelled.

    `channel.close(grace)` does not do: a cancelled one leaves the channel open, and no later `close` ends it.
    """
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(TRANSFER_S):
                for call in list(calls):
                    await call.code()
    finally:
        await channel.close(None)
