"""What the HTTPS plane allows those who show no operator's token: little at a time, and few wrong tokens.

Two pieces of ASGI middleware. `OperatorFirst` limits the requests at work, keeps most places for
operators, and refuses a stranger's body before it is read, except at enrolment. `EnrolmentLimit` slows
down an address whose enrolments are refused; a token that is good stays good.
"""

from __future__ import annotations

import hmac
import json
import math
import time
from collections.abc import Callable
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgefl.protocols.connections import source_of
from edgefl.protocols.http_limits import RequestLimit, has_body
from edgefl.protocols.pacing import TokenBucket

ENROLMENT = "/v1/enroll"
NEEDS_TOKEN = "this needs the operator's token: give --credentials, the operator.json of the cloud's home"  # noqa: S105
MAX_ACTIVE, FOR_OPERATORS = 256, 192  # requests at work
REFUSALS_PER_S, REFUSALS_BURST = 0.5, 20  # of one address's enrolments
LONGEST_S = 4.0  # that an address has to wait
MAX_SOURCES = 10_000


class OperatorFirst:
    """Limits requests at work; see the module."""

    def __init__(self, app: ASGIApp, *, token: str) -> None:
        self._limit = RequestLimit(app, max_active=MAX_ACTIVE, reserved=FOR_OPERATORS, vouches=self._is_operator)
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and has_body(scope) and scope["path"] != ENROLMENT and not self._is_operator(scope):
            await _answer(send, 401, NEEDS_TOKEN, {"WWW-Authenticate": "Bearer", "Connection": "close"})
        else:
            await self._limit(scope, receive, send)

    def _is_operator(self, scope: Scope) -> bool:
        return is_operator(Headers(scope=scope).get("authorization", ""), self._token)


class EnrolmentLimit:
    """Slows down whose enrolments are refused; see the module."""

    def __init__(self, app: ASGIApp, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._clock = app, clock
        self._refusals: dict[str, TokenBucket] = {}  # by source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != ENROLMENT:
            await self._app(scope, receive, send)
            return
        refusals = self._of(source_of((scope.get("client") or ("",))[0]))
        if (wait_s := refusals.take(0)) > 0:
            text = f"too many enrolments from your address were refused; try again in {math.ceil(wait_s)} s. "
            await _answer(
                send, 429, f"{text}A token that is good is still good", {"Retry-After": str(math.ceil(wait_s))}
            )
            return

        async def noted(message: Message) -> None:
            refused = message["type"] == "http.response.start" and message["status"] == HTTPStatus.FORBIDDEN
            if refused and refusals.take(0) < LONGEST_S:  # others may share the address
                refusals.take()
            await send(message)

        await self._app(scope, receive, noted)

    def _of(self, source: str) -> TokenBucket:
        if source not in self._refusals and len(self._refusals) >= MAX_SOURCES:
            self._refusals = {key: one for key, one in self._refusals.items() if not one.idle()}
            if len(self._refusals) >= MAX_SOURCES:
                source = ""  # so many are slowed down that the others share one measure
        if source not in self._refusals:
            self._refusals[source] = TokenBucket(REFUSALS_PER_S, REFUSALS_BURST, self._clock)
        return self._refusals[source]


def is_operator(authorization: str, token: str) -> bool:
    """Whether an Authorization header shows the operator's token; compared in constant time."""
    scheme, _, shown = authorization.partition(" ")
    return hmac.compare_digest(shown.strip().encode(), token.encode()) and scheme.lower() == "bearer"


async def _answer(send: Send, status: int, text: str, headers: dict[str, str]) -> None:
    body = json.dumps({"error": text}).encode()
    shown = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in shown.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
