"""What the routes share: the services of a request, strict bodies, and streams of JSON lines."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Annotated, Any, TypeVar

import anyio
import anyio.to_thread
from fastapi import Depends, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, model_validator

from cloud.http.services import Services
from edgefl.errors import ConfigError, NotFound
from edgefl.protocols.fields import Limits, json_fault
from edgefl.terminal.text import for_json

UPLOAD_PATH = "/v1/blobs"
MAX_STREAMS = 64

MAX_BODY_CHARS, MAX_BODY_ITEMS = 1 << 20, 100_000  # a request's body is bounded itself

HEARTBEAT: Mapping[str, Any] = {"heartbeat": True}

_T = TypeVar("_T")


class Body(BaseModel):
    """A request's JSON. Unknown keys and values that no lower layer could hold are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _can_be_held(cls, value: Any) -> Any:
        limits = Limits(max_chars=MAX_BODY_CHARS, max_items=MAX_BODY_ITEMS, lines=True)
        if fault := json_fault(value, limits):
            raise ValueError(f"the body {fault}")
        return value


class CleanJSON(JSONResponse):
    """An answer in strict JSON: text is on one line, a number that is not finite is null."""

    def render(self, content: Any) -> bytes:
        return as_json(content)


def as_json(value: Any) -> bytes:
    """Return the strict JSON of a value, cleaned (`edgefl.terminal.text.for_json`)."""
    return json.dumps(for_json(value), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


async def services_of(request: Request) -> Services:
    """Return the services of a request's application."""
    services: Services = request.app.state.services
    return services


Here = Annotated[Services, Depends(services_of)]


def known(find: Callable[[str], _T], key: str) -> _T:
    """Call `find` for an object in a URL; its errors for an unknown object become a 404."""
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
        yield as_json(line) + b"\n"
