"""A cache of parsed HTTP heads: a request with a cached head is answered without parsing it again.

A client sends the same request line and headers with each request. If a head is byte for byte equal to one that the
server has parsed, the model is found and run directly in the call that delivers the bytes. HTTP parsing, a task and
another turn of the event loop are a third of the cost of a small request.
Invariant: a response from here equals the server's own. Requests that are unusual or slow, and all errors, are left to
the server.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edge_agent.serving.inference import (
    InferenceRequest,
    InferenceResponse,
    encode_response,
    is_small_request,
    is_small_response,
    parse_request,
)
from edge_agent.sessions import LoadedModel
from edgefl.errors import ProtocolError
from edgefl.protocols.ports.http_limits import HeadersAndBody

MAX_CACHED, MAX_HEAD_BYTES = 64, 4096  # number of heads, size of one
_END = b"\r\n\r\n"
_LENGTH, _HEADER_LENGTH = b"content-length", b"inference-header-content-length"
_NOT_PLAIN = frozenset({b"transfer-encoding", b"content-encoding", b"expect", b"upgrade", b"te", b"trailer"})

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _ParsedHead:
    """The relevant content of a head."""

    model: str
    version: str | None
    header_length: str | None
    num_bytes: int  # of the body


class _ResponseTooLarge(Exception):
    """A response is too large to be written in the event loop."""


class RequestCache:
    """The `FastPath` of the server of predictions."""

    def __init__(
        self,
        find: Callable[[str], LoadedModel | None],
        run: Callable[[LoadedModel, InferenceRequest], list[Any]],
        allows: Callable[[Mapping[str, Any]], bool],
    ) -> None:
        self._find, self._run, self._allows = find, run, allows
        self._heads: dict[bytes, _ParsedHead | None] = {}  # None = its responses are too large for the event loop

    def respond(self, data: bytes) -> HeadersAndBody | None:
        """Return headers and body of the response to one complete request; None to leave it to the server."""
        end = data.find(_END, 0, MAX_HEAD_BYTES) + len(_END)
        known = self._heads.get(data[:end])
        if known is None or len(data) - end != known.num_bytes:
            return None
        served = self._find(known.model)
        if served is None or not served.inline or known.version not in {None, str(served.version)}:
            return None
        response = None
        try:
            response = self._computed(served, data[end:], known.header_length)
        except _ResponseTooLarge:
            self._heads[data[:end]] = None
        except (ProtocolError, MemoryError):
            pass  # the server runs into it too, and responds with the reason
        except Exception:  # noqa: BLE001 - an error of this shortcut alone costs nothing but time
            _log.exception("serving.fast_path_failed model=%s: the server takes the request", known.model)
        if response is None:
            return None
        return [(name.lower().encode(), value.encode()) for name, value in response.headers.items()], response.body

    def _computed(self, served: LoadedModel, body: bytes, header_length: str | None) -> InferenceResponse | None:
        request = parse_request(served, body, header_length) if is_small_request(body, header_length) else None
        if request is None or not served.runs_inline(request.feeds):
            return None
        results = self._run(served, request)
        if not is_small_response(request, results):
            raise _ResponseTooLarge
        return encode_response(served, request, results)

    def add(self, data: bytes, scope: Mapping[str, Any]) -> None:
        """Cache the head of a complete request that the server has parsed."""
        end = data.find(_END, 0, MAX_HEAD_BYTES) + len(_END)
        head = data[:end]
        if end < len(_END) or head in self._heads or (known := _parsed(head, scope)) is None:
            return
        if known.num_bytes == len(data) - end and self._allows(scope):
            if len(self._heads) >= MAX_CACHED:
                self._heads.clear()
            self._heads[head] = known


def _parsed(head: bytes, scope: Mapping[str, Any]) -> _ParsedHead | None:
    """Return the content of a head; None if such requests are left to the server."""
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
    return _ParsedHead(model, version, header_length, int(values[_LENGTH]))
