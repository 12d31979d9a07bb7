"""What the routes share: the services of a request, strict bodies, and streams of JSON lines."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Annotated, Any, TypeVar

import anyio
import anyio.to_thread
from fastapi import Depends, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict

from cloud.services import Services
from edgefl.errors import ConfigError, NotFound

UPLOAD_PATH = "/v1/blobs"
MAX_STREAMS = 64

HEARTBEAT: Mapping[str, Any] = {"heartbeat": True}

_T = TypeVar("_T")


class Body(BaseModel):
    """A request's JSON. An unknown key is a typo, and refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


async def services_of(request: Request) -> Services:
    """Return the services of the application that a request came to."""
    services: Services = request.app.state.services
    return services


Here = Annotated[Services, Depends(services_of)]


def known(find: Callable[[str], _T], key: str) -> _T:
    """Find what a URL names; what is not there is a 404, by whichever error the finder says it."""
    try:
        return find(key)
    except ConfigError as absent:
        raise NotFound(str(absent)) from absent


def stream_lines(request: Request, lines: Iterator[Mapping[str, Any]]) -> StreamingResponse:
    """Answer with NDJSON from an iterator that blocks for a heartbeat's time at most.

    It waits in one of MAX_STREAMS threads, not in those that answer requests; further streams take turns.
    """
    limiter: anyio.CapacityLimiter = request.app.state.stream_threads
    return StreamingResponse(_encoded(lines, limiter), media_type="application/x-ndjson")


async def _encoded(lines: Iterator[Mapping[str, Any]], limiter: anyio.CapacityLimiter) -> AsyncIterator[bytes]:
    def following() -> Mapping[str, Any] | None:
        return next(lines, None)

    while (line := await anyio.to_thread.run_sync(following, abandon_on_cancel=True, limiter=limiter)) is not None:
        yield json.dumps(line, separators=(",", ":")).encode() + b"\n"
