"""Routes about relays: start one for a Flower app, send messages, follow and fetch replies, end it.

Every route is idempotent, so that a client whose response was lost can send the request again.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import APIRouter, Path, Request
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import Field

from cloud.dataplane.live_relay import MAX_MESSAGE_BYTES
from cloud.http.jobs import MAX_NAME_CHARS, store_body
from cloud.http.shared import Body, Here, stream_lines
from cloud.state.relay_rows import RelayMessage
from edgefl.errors import ConfigError
from edgefl.protocols.messages import BlobRef

MAX_MESSAGES = 500  # in one request

operator = APIRouter(prefix="/v1/relays")

Sha256 = Annotated[str, Path(pattern="^[0-9a-f]{64}$")]


class RelayRequest(Body):
    """A Flower app whose bundle is uploaded."""

    app: str = Field(max_length=500)  # module:attribute of its ClientApp
    bundle: BlobRef
    name: str | None = Field(default=None, max_length=MAX_NAME_CHARS)  # of the app, for people
    label: str | None = Field(default=None, max_length=MAX_NAME_CHARS)  # of the run, for people


class OneMessage(Body):
    """One message; `content` is uploaded to the relay already."""

    number: int = Field(ge=1, lt=1 << 31)
    device: str = Field(max_length=200)
    envelope: str = Field(min_length=1, max_length=16 << 10)
    content: str = Field(pattern="^[0-9a-f]{64}$")
    within_s: float = Field(gt=0, le=1e7)


class Messages(Body):
    """Messages in rising order of their numbers."""

    messages: list[OneMessage] = Field(max_length=MAX_MESSAGES)


class Numbers(Body):
    """Numbers of messages that the operator has acknowledged."""

    numbers: list[int] = Field(max_length=10_000)


class Ending(Body):
    """How a run ended."""

    state: Literal["done", "failed", "cancelled"]
    error: str | None = Field(default=None, max_length=10_000)


@operator.post("")
def start(body: RelayRequest, here: Here) -> dict[str, str]:
    """Begin a relay."""
    if not here.blobs.has(body.bundle.sha256):
        raise ConfigError(f"the app's bundle {body.bundle.sha256[:16]}... is not in the cloud; upload it first")
    return {"id": here.relays.start(body.app, body.bundle, body.name, body.label)}


@operator.put("/{relay}/contents/{sha256}")
async def upload(request: Request, relay: str, sha256: Sha256, here: Here) -> BlobRef:
    """Store the content of messages of this relay."""
    contents = await anyio.to_thread.run_sync(here.relays.contents, relay)
    return await store_body(request, contents, here, sha256=sha256, max_bytes=MAX_MESSAGE_BYTES)


@operator.delete("/{relay}/contents/{sha256}")
def forget(relay: str, sha256: Sha256, here: Here) -> dict[str, Any]:
    """Delete content that no message needs any more."""
    here.relays.contents(relay).delete(sha256)
    return {"removed": sha256}


@operator.post("/{relay}/messages")
def send(relay: str, body: Messages, here: Here) -> dict[str, int]:
    """Send messages to devices."""
    now_s = time.time()
    here.relays.send(
        relay,
        [
            RelayMessage(
                number=one.number,
                device=one.device,
                envelope=one.envelope,
                content_sha256=one.content,
                expires_s=now_s + one.within_s,
            )
            for one in body.messages
        ],
    )
    return {"sent": len(body.messages)}


@operator.get("/{relay}/events")
def events(request: Request, relay: str, here: Here) -> StreamingResponse:
    """Stream one line per unacknowledged reply, heartbeats in between, and the relay's end."""
    here.relays.get(relay)
    return stream_lines(request, here.relays.lines(relay, here.heartbeat_s))


@operator.get("/{relay}/replies/{number}")
def reply(relay: str, number: int, here: Here) -> FileResponse:
    """Return the bytes of a reply."""
    return FileResponse(here.relays.reply(relay, number), media_type="application/octet-stream")


@operator.post("/{relay}/done")
def done(relay: str, body: Numbers, here: Here) -> dict[str, int]:
    """Forget messages and their replies."""
    here.relays.done(relay, body.numbers)
    return {"done": len(body.numbers)}


@operator.post("/{relay}/end")
def end(relay: str, body: Ending, here: Here) -> dict[str, Any]:
    """End a relay; one that is over stays as it is."""
    here.relays.end(relay, body.state, body.error)
    return here.relays.get(relay)
