"""Limits for clients of the HTTPS plane without an operator's token: few requests at a time, few refused enrolments.

Two pieces of ASGI middleware. `OperatorFirst` limits the requests at work, keeps most places for
operators, refuses a stranger's body before it is read, except at enrolment, and slows down an address that
asks too often. `EnrolmentLimit` slows
down an address whose enrolments are refused; a token that is good stays good.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import time
from collections.abc import Callable
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgefl.protocols.ports.connections import Connection, source_of
from edgefl.protocols.ports.http_limits import PLACE, RequestLimit, has_body
from edgefl.protocols.ports.pacing import Buckets

ENROLMENT = "/v1/enroll"
NEEDS_TOKEN = "this needs the operator's token: give --credentials, the operator.json of the cloud's home"  # noqa: S105
MAX_ACTIVE, FOR_OPERATORS = 256, 192  # requests at work
REQUESTS_PER_S, REQUESTS_BURST = 100, 400  # of one address without a token
REFUSALS_PER_S, REFUSALS_BURST = 0.5, 20  # of one address's enrolments
LONGEST_S = 4.0  # that a request is held back


class OperatorFirst:
    """Limits concurrent requests, and requests per second and address; see the module's docstring."""

    def __init__(self, app: ASGIApp, *, token: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = RequestLimit(app, max_active=MAX_ACTIVE, reserved=FOR_OPERATORS, vouches=self._is_operator)
        self._token = token
        self._requests = Buckets(REQUESTS_PER_S, REQUESTS_BURST, clock)  # of strangers, by address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_operator(scope):
            await self._limit(scope, receive, send)
        elif has_body(scope) and scope["path"] != ENROLMENT:
            await _answer(send, 401, NEEDS_TOKEN, {"WWW-Authenticate": "Bearer", "Connection": "close"})
        elif (wait_s := self._requests.of(_source(scope)).take()) > LONGEST_S:
            text = f"your address sends more than {REQUESTS_PER_S} requests per second; try again later"
            await _answer(send, 429, text, {"Retry-After": str(math.ceil(wait_s)), "Connection": "close"})
        else:
            if wait_s > 0:
                await _wait(scope, wait_s)
            await self._limit(scope, receive, send)

    def _is_operator(self, scope: Scope) -> bool:
        return is_operator(Headers(scope=scope).get("authorization", ""), self._token)


class EnrolmentLimit:
    """Slows down addresses whose enrolments are refused; see the module's docstring."""

    def __init__(self, app: ASGIApp, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._refusals = Buckets(REFUSALS_PER_S, REFUSALS_BURST, clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != ENROLMENT:
            await self._app(scope, receive, send)
            return
        refusals = self._refusals.of(_source(scope))
        if (wait_s := refusals.take(0)) > 0:
            text = f"too many enrolments from your address were refused; try again in {math.ceil(wait_s)} s. "
            await _answer(send, 429, f"{text}A valid token stays valid", {"Retry-After": str(math.ceil(wait_s))})
            return

        async def noted(message: Message) -> None:
            refused = message["type"] == "http.response.start" and message["status"] == HTTPStatus.FORBIDDEN
            if refused and refusals.take(0) < LONGEST_S:  # others may share the address
                refusals.take()
            await send(message)

        await self._app(scope, receive, noted)


def is_operator(authorization: str, token: str) -> bool:
    """Whether an Authorization header shows the operator's token; compared in constant time."""
    scheme, _, shown = authorization.partition(" ")
    return hmac.compare_digest(shown.strip().encode(), token.encode()) and scheme.lower() == "bearer"


async def _wait(scope: Scope, seconds: float) -> None:
    """Let a request wait; meanwhile its connection makes room for others, if need be."""
    place: Connection | None = scope.get("state", {}).get(PLACE)
    if place is not None:
        place.wait(2 * seconds)
    await asyncio.sleep(seconds)
    if place is not None:
        place.serve()


def _source(scope: Scope) -> str:
    return source_of((scope.get("client") or ("",))[0])


async def _answer(send: Send, status: int, text: str, headers: dict[str, str]) -> None:
    body = json.dumps({"error": text}).encode()
    shown = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in shown.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
