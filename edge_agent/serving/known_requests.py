"""Requests whose head came before, byte for byte: answered without reading it again.

A client sends the same request line and headers before each of its requests. The server has read them once, so they
are known to say the same again: what is left is to find the model and to compute, in the very call that brings the
bytes. Reading HTTP, a task and its turn in the event loop are a third of what a small request costs.
Invariant: a request is answered here as the server would answer it; whatever is not plain and quick, or goes wrong,
is left to the server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edge_agent.serving.inference import Request, Response, answers_at_once, encode_response, is_small, parse_request
from edge_agent.sessions import Served
from edgefl.protocols.ports.http_limits import Answered

MAX_KEPT, MAX_HEAD_BYTES = 64, 4096
_END = b"\r\n\r\n"
_LENGTH, _HEADER_LENGTH = b"content-length", b"inference-header-content-length"
_NOT_PLAIN = frozenset({b"transfer-encoding", b"content-encoding", b"expect", b"upgrade", b"te", b"trailer"})


@dataclass(frozen=True, slots=True)
class _Known:
    """What a head says."""

    model: str
    version: str | None
    header_length: str | None
    num_bytes: int  # of the body


class _TooLong(Exception):
    """An answer takes too long to be written in the event loop."""


class KnownRequests:
    """The shortcut of a server for predictions."""

    def __init__(
        self,
        find: Callable[[str], Served | None],
        run: Callable[[Served, Request], list[Any]],
        allows: Callable[[Mapping[str, Any]], bool],
    ) -> None:
        self._find, self._run, self._allows = find, run, allows
        self._heads: dict[bytes, _Known | None] = {}  # None = its answers are too long to be written at once

    def answer(self, data: bytes) -> Answered | None:
        """Return the headers and body that answer one whole request; None where it is for the server."""
        end = data.find(_END, 0, MAX_HEAD_BYTES) + len(_END)
        known = self._heads.get(data[:end])
        if known is None or len(data) - end != known.num_bytes:
            return None
        served = self._find(known.model)
        if served is None or not served.inline or known.version not in {None, str(served.version)}:
            return None
        try:
            response = self._computed(served, data[end:], known.header_length)
        except _TooLong:
            self._heads[data[:end]] = None
            return None
        except Exception:  # noqa: BLE001 - the server meets it too: it answers it, and logs a fault of ours
            return None
        if response is None:
            return None
        return [(name.lower().encode(), value.encode()) for name, value in response.headers.items()], response.body

    def _computed(self, served: Served, body: bytes, header_length: str | None) -> Response | None:
        request = parse_request(served, body, header_length) if is_small(body, header_length) else None
        if request is None or not served.is_quick(request.feeds):
            return None
        results = self._run(served, request)
        if not answers_at_once(request, results):
            raise _TooLong
        return encode_response(served, request, results)

    def learn(self, data: bytes, scope: Mapping[str, Any]) -> None:
        """Remember the head of a whole request that the server has read."""
        end = data.find(_END, 0, MAX_HEAD_BYTES) + len(_END)
        head = data[:end]
        if end < len(_END) or head in self._heads or (known := _known(head, scope)) is None:
            return
        if known.num_bytes == len(data) - end and self._allows(scope):
            if len(self._heads) >= MAX_KEPT:
                self._heads.clear()
            self._heads[head] = known


def _known(head: bytes, scope: Mapping[str, Any]) -> _Known | None:
    """Return what a head says; None for one that is not for here."""
    headers = scope["headers"]
    names = [name for name, _ in headers]
    num_lines = len(headers) + 2  # the request line, and the empty one
    plain = (
        scope["method"] == "POST"
        and scope["http_version"] == "1.1"
        and head.count(b"\r\n") == head.count(b"\n") == num_lines
        and _NOT_PLAIN.isdisjoint(names)
        and all(value.lower() == b"keep-alive" for name, value in headers if name == b"connection")
        and names.count(_LENGTH) == 1
        and names.count(_HEADER_LENGTH) <= 1
    )
    match [part for part in scope["path"].split("/") if part]:
        case ["v2", "models", model, "infer"] if plain:
            version = None
        case ["v2", "models", model, "versions", version, "infer"] if plain:
            pass
        case _:
            return None
    values = dict(headers)
    header_length = values[_HEADER_LENGTH].decode("latin-1") if _HEADER_LENGTH in values else None
    return _Known(model, version, header_length, int(values[_LENGTH]))
