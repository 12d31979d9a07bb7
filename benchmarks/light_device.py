"""A device in some hundred kilobytes: it speaks the fleet's protocols over MQTT and gRPC, but does not train.

It has an identity of its own. It announces itself, asks `Next` from time to time, and answers each round that is
announced to it: it downloads the model and uploads an update that was prepared, with a weight. So one process holds
thousands of them, and what is measured is the cloud.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols import messages, topics
from edgefl.protocols.assignments import unpack
from edgefl.protocols.chunks import CHUNK_BYTES, chunk_data, encode_upload
from edgefl.protocols.messages import ASSIGNMENTS, DeviceState, Fit, JobMessage
from edgefl.protocols.tls import Identity, client_context, grpc_channel_credentials

HOST = "127.0.0.1"
ASK_EVERY_S, PING_EVERY_S = 30.0, 60.0
CONNECT_S = 300.0
PAUSES_S = (0.2, 1.0, 5.0, 20.0)  # before an answer is tried again
_CONNECT, _PUBLISH, _PUBACK, _SUBSCRIBE, _PING = 0x10, 0x30, 0x40, 0x82, 0xC0


@dataclass(frozen=True, kw_only=True, slots=True)
class Where:
    """The addresses that a device connects to, and what it does there."""

    mqtt_port: int
    grpc_port: int
    announce: bool  # whether they report that they are online, and so are chosen for rounds
    update: Path | None = None  # what they answer to each round; None = nothing
    server_name: str = ""  # that the servers' certificates must have; empty = their address

    def channel(self, identity: Identity) -> grpc.aio.Channel:
        """Return a channel to the data plane, with a connection of its own."""
        options: list[tuple[str, Any]] = [("grpc.use_local_subchannel_pool", 1)]
        options += [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []
        return grpc.aio.secure_channel(f"{HOST}:{self.grpc_port}", grpc_channel_credentials(identity), options)


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """The result of a device's first connection over MQTT or gRPC, or of an upload."""

    device: str
    door: str  # mqtt | grpc | upload
    refusal: str = ""  # empty: accepted


@dataclass(frozen=True, slots=True)
class Update:
    """The bytes of an update, and their BLAKE3; shared by all devices of a process."""

    data: bytes
    blake3: str


class LightDevice:
    """One device. `told` gets what its connections and uploads come to."""

    def __init__(self, where: Where, home: Path, told: Any, update: Update | None = None) -> None:
        self.name, self._where, self._told, self._update = home.name, where, told, update
        self._identity = Identity.in_folder(home)
        self._answering: set[asyncio.Task[None]] = set()
        self._begun: tuple[str, int] | None = None  # the job and the round of its last answer

    async def hold_mqtt(self, turns: asyncio.Semaphore) -> None:
        """Stay connected to the broker, and answer what it announces."""
        async with turns:
            context = client_context(self._identity.ca, self._identity)
            name = self._where.server_name or HOST
            reader, writer = await asyncio.open_connection(
                HOST, self._where.mqtt_port, ssl=context, server_hostname=name
            )
            hello = b"\0\4MQTT\4\2" + int(2 * PING_EVERY_S).to_bytes(2) + _text(self.name)
            writer.write(packet(_CONNECT, hello))
            answer = await reader.readexactly(4)
            if answer[3]:
                self._tell("mqtt", f"CONNACK {answer[3]}")
                writer.close()
                return
            if self._update is not None:
                writer.write(packet(_SUBSCRIBE, b"\0\1" + _text(topics.down(self.name, "job")) + b"\1"))
            if self._where.announce:
                state = DeviceState(session=1, online=True, agent_version="light", models={}, tags={}, serving_url="")
                body = _text(topics.up(self.name, "state")) + messages.encode(state)
                writer.write(packet(_PUBLISH | 1, body))
                await writer.drain()
            self._tell("mqtt")
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_ping(writer))
            while True:
                self._take(*await _read_packet(reader), writer)

    async def hold_grpc(self, turns: asyncio.Semaphore) -> None:
        """Stay connected to the data plane."""
        async with self._where.channel(self._identity) as channel:
            self._channel = channel
            ask: Any = channel.unary_unary(
                "/edgefl.v1.Fleet/Next", pb.NextRequest.SerializeToString, pb.NextReply.FromString
            )
            asked = pb.NextRequest(agent_version="light", knows=ASSIGNMENTS)
            async with turns:
                try:
                    await ask(asked, wait_for_ready=True, timeout=CONNECT_S)
                except grpc.aio.AioRpcError as error:
                    self._tell("grpc", f"{error.code().name} {error.details()}")
                    return
                self._tell("grpc")
            while True:
                await asyncio.sleep(ASK_EVERY_S)
                with contextlib.suppress(grpc.aio.AioRpcError):  # a busy cloud: it is asked again
                    reply = await ask(asked, wait_for_ready=True, timeout=ASK_EVERY_S)
                    for assignment in unpack(reply):
                        self._begin(assignment)

    def _take(self, head: int, body: bytes, writer: asyncio.StreamWriter) -> None:
        """Take a packet of the broker: an announcement begins an answer."""
        if head & 0xF0 != _PUBLISH or self._update is None:
            return
        at = 2 + int.from_bytes(body[:2])
        if head & 0x06:  # QoS 1
            writer.write(bytes([_PUBACK, 2]) + body[at : at + 2])
            at += 2
        self._begin(_decoded(body[at:]))

    def _begin(self, message: JobMessage) -> None:
        """Answer a round, unless that is under way or done."""
        if not isinstance(message, Fit) or self._update is None or self._begun == (message.job, message.round):
            return
        self._begun = message.job, message.round
        task = asyncio.create_task(self._answer(message, self._update), name=f"answer-{self.name}")
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _answer(self, fit: Fit, update: Update) -> None:
        """Download the model and upload the update; again after an error, as an agent does."""
        for pause_s in PAUSES_S:
            try:
                refusal = await self._download(fit) or await self._upload(fit, update)
            except grpc.aio.AioRpcError as error:
                self._tell("upload", f"{error.code().name} {error.details()}")
                await asyncio.sleep(pause_s)
                continue
            if refusal:
                self._tell("upload", refusal)
            return

    async def _download(self, fit: Fit) -> str:
        """Download the model; return what is wrong with it."""
        call: Any = self._channel.unary_stream("/edgefl.v1.Fleet/Download", pb.DownloadRequest.SerializeToString, None)
        size = 0
        async for message in call(pb.DownloadRequest(sha256=fit.model.sha256), wait_for_ready=True):
            size += len(chunk_data(message))
        return "" if size == fit.model.size else f"the model came with {size} bytes, expected {fit.model.size}"

    async def _upload(self, fit: Fit, update: Update) -> str:
        """Upload the update; return why it was not stored."""
        call: Any = self._channel.stream_unary("/edgefl.v1.Fleet/Upload", None, pb.UploadState.FromString)
        header = pb.UploadHeader(
            key=pb.UpdateKey(job=fit.job, round=fit.round), size=len(update.data), blake3=update.blake3, weight=1.0
        )
        state = await call(_chunks(header, update.data), wait_for_ready=True)
        name = pb.UploadState.Status.Name(state.status)
        return "" if name == "STORED" else f"{name} {state.reason}"

    def _tell(self, door: str, refusal: str = "") -> None:
        self._told.put(Told(device=self.name, door=door, refusal=refusal))


@functools.lru_cache(maxsize=16)  # a round's announcement is the same for all devices
def _decoded(payload: bytes) -> JobMessage:
    return messages.decode_job(payload)


async def _chunks(header: pb.UploadHeader, data: bytes) -> AsyncIterator[bytes]:
    yield pb.UploadChunk(header=header).SerializeToString()
    view = memoryview(data)
    for start in range(0, len(view), CHUNK_BYTES):
        yield encode_upload(view[start : start + CHUNK_BYTES])


async def _ping(writer: asyncio.StreamWriter) -> None:
    while True:
        await asyncio.sleep(PING_EVERY_S)
        writer.write(bytes([_PING, 0]))
        with contextlib.suppress(ConnectionError):
            await writer.drain()


async def _read_packet(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Return the first byte and the body of the next packet (MQTT 3.1.1, section 2.2)."""
    head, size, shift = (await reader.readexactly(1))[0], 0, 0
    while True:
        byte = (await reader.readexactly(1))[0]
        size, shift = size | (byte & 0x7F) << shift, shift + 7
        if byte < 0x80:
            return head, await reader.readexactly(size)


def packet(head: int, body: bytes) -> bytes:
    """Return an MQTT packet with this first byte."""
    size, left = bytearray(), len(body)
    while True:
        size.append(left & 0x7F | (0x80 if left > 0x7F else 0))
        if not (left := left >> 7):
            return bytes([head]) + bytes(size) + body


def _text(text: str) -> bytes:
    return len(text.encode()).to_bytes(2) + text.encode()
