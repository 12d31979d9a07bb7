"""OpenAI's API on one model: `/v1/models`, `/v1/chat/completions`, `/v1/completions`, also as streams of events.

https://platform.openai.com/docs/api-reference. Few texts are generated at a time, some more wait; others are refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from edge_agent.generation.api_error import ApiError
from edge_agent.generation.generator import Generator, TextJob
from edge_agent.generation.requests import TextRequest, parse_request
from edge_agent.generation.responses import DONE, TextReply, Usage, encoded, event_of, model_object
from edge_agent.generation.text import StopTexts, TextCodec
from edge_agent.generation.wire import EVENTS, JSON, ResponseHead
from edgefl.errors import ProtocolError
from edgefl.logs import event
from edgefl.offload.generation.stage_info import StageInfo

MAX_TEXTS = 4  # generated at a time
MAX_WAITING = 16

_log = logging.getLogger(__name__)

Send = Callable[[ResponseHead | bytes], Awaitable[None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextModel:
    """A model that can generate."""

    info: StageInfo
    codec: TextCodec
    generator: Generator

    @property
    def fingerprint(self) -> str:
        return f"fp_{self.info.digest[:10]}"


@dataclass(slots=True)
class _Text:
    """A text that is generated."""

    prompt: int  # tokens
    completion: int = 0
    finish: str = ""


class OpenAiEndpoint:
    """Answers the requests for one model, once it is loaded."""

    def __init__(self) -> None:
        self.model: TextModel | None = None
        self.refusal = "the model is still being loaded; try again"  # while there is none
        self._texts = asyncio.Semaphore(MAX_TEXTS)
        self._num_requests = 0
        self._created_s = int(time.time())

    async def answer(self, method: str, path: str, body: bytes, send: Send) -> None:
        """Answer one request with `send`: a head, then pieces of the body."""
        try:
            await self._route(method, path, body, send)
        except ApiError as error:
            await send(ResponseHead(status=error.status, type=JSON))
            await send(encoded(error.as_json()))

    async def _route(self, method: str, path: str, body: bytes, send: Send) -> None:
        parts = [part for part in path.split("/") if part]
        known = {"models": "GET", "completions": "POST", "chat": "POST"}
        is_known = parts[1:] in (["models"], ["completions"], ["chat", "completions"]) or (
            len(parts) >= 3 and parts[1] == "models"
        )
        if not is_known:
            raise ApiError(404, f"there is no {path[:80]!r}; there are /v1/models, /v1/chat/completions and "
                                "/v1/completions", code="not_found")  # fmt: skip
        if method != known[parts[1]]:
            raise ApiError(405, f"{path[:80]} takes {known[parts[1]]}, not {method[:20]}", code="method_not_allowed")
        if self.model is None:
            raise ApiError(503, self.refusal, code="model_not_ready")
        if parts[1] == "models":
            await self._models(self.model.info.name, "/".join(parts[2:]), send)
            return
        request = parse_request(body, is_chat=parts[1] == "chat")
        _refuse_other_model(request.model, self.model.info.name)
        if self._num_requests >= MAX_TEXTS + MAX_WAITING:
            raise ApiError(
                429, f"{self._num_requests} texts are generated or wait here already; try again", code="device_full",
                kind="rate_limit_error",
            )  # fmt: skip
        self._num_requests += 1
        try:
            await self._complete(request, self.model, send)
        finally:
            self._num_requests -= 1

    async def _models(self, own: str, name: str, send: Send) -> None:
        if name:
            _refuse_other_model(name, own)
        made = model_object(own, self._created_s)
        await send(ResponseHead(status=200, type=JSON))
        await send(encoded(made if name else {"object": "list", "data": [made]}))

    async def _complete(self, request: TextRequest, model: TextModel, send: Send) -> None:
        job = TextJob(prompt=_prompt(request, model), max_tokens=request.max_tokens, sampling=request.sampling)
        reply = TextReply(
            id=f"{'chatcmpl' if request.is_chat else 'cmpl'}-{secrets.token_hex(12)}", model=request.model,
            created_s=int(time.time()), fingerprint=model.fingerprint, is_chat=request.is_chat,
        )  # fmt: skip
        text = _Text(prompt=len(job.prompt))
        async with self._texts, contextlib.aclosing(_pieces(request, job, model, text)) as pieces:
            if request.streams:
                await _stream(request, reply, pieces, text, send)
                return
            whole = "".join([one async for one in pieces])
        usage = Usage(prompt=text.prompt, completion=text.completion)
        await send(ResponseHead(status=200, type=JSON))
        await send(encoded(reply.whole(whole, text.finish, usage)))


def _refuse_other_model(name: str, own: str) -> None:
    if name != own:
        raise ApiError(404, f"the model {name[:80]!r} does not exist; this device has {own!r}", param="model",
                       code="model_not_found")  # fmt: skip


def _prompt(request: TextRequest, model: TextModel) -> list[int]:
    """Return the prompt's tokens; raises ApiError if it does not fit the model's context."""
    spec, codec = model.info.spec, model.codec
    param = "messages" if request.is_chat else "prompt"
    try:
        if request.is_chat:
            tokens = codec.encode_chat(request.messages)
        else:
            tokens = list(request.prompt) if isinstance(request.prompt, list) else codec.encode(request.prompt)
    except ProtocolError as cause:
        raise ApiError(400, str(cause), param=param) from cause
    if not tokens or max(tokens) >= spec.vocabulary:
        raise ApiError(400, f"the prompt has no tokens, or one of {spec.vocabulary} or more", param=param)
    if len(tokens) + request.max_tokens > spec.context:
        raise ApiError(
            400,
            f"This model's maximum context length is {spec.context} tokens. However, you requested "
            f"{len(tokens) + request.max_tokens} tokens ({len(tokens)} in the prompt, {request.max_tokens} in the "
            "completion). Please reduce the length of the prompt, or max_tokens.",
            param=param, code="context_length_exceeded",
        )  # fmt: skip
    return tokens


async def _pieces(request: TextRequest, job: TextJob, model: TextModel, text: _Text) -> AsyncGenerator[str, None]:
    """Yield the pieces of the text, and note in `text` how it ended."""
    codec, generator = model.codec, model.generator
    stream, stops = codec.decoding(), StopTexts(request.stops)
    begun_s, replays = time.monotonic(), generator.num_replays
    text.finish = "length"
    async with contextlib.aclosing(generator.tokens(job)) as tokens:
        async for token in tokens:
            text.completion += 1
            if token in codec.end_tokens:
                text.finish = "stop"
                break
            if shown := stops.feed(stream.add(token)):
                yield shown
            if stops.is_over:
                text.finish = "stop"
                break
    if not stops.is_over and (left := stops.feed(stream.rest()) + stops.rest()):
        yield left
    event(_log, logging.INFO, "text.done", prompt=text.prompt, completion=text.completion, finish=text.finish,
          seconds=round(time.monotonic() - begun_s, 3), replays=generator.num_replays - replays)  # fmt: skip


async def _stream(request: TextRequest, reply: TextReply, pieces: AsyncIterator[str], text: _Text, send: Send) -> None:
    """Send a text as events. Its first piece is awaited before the head: until then, an error has a status."""
    first = await anext(pieces, "")
    await send(ResponseHead(status=200, type=EVENTS))
    await send(reply.chunk(first, begins=True))
    try:
        async for one in pieces:
            await send(reply.chunk(one))
    except ApiError as error:
        event(_log, logging.WARNING, "text.cut", reason=error, completion=text.completion)
        await send(event_of(error.as_json()))
        return
    await send(reply.chunk("", text.finish))
    if request.with_usage:
        await send(reply.usage_chunk(Usage(prompt=text.prompt, completion=text.completion)))
    await send(DONE)
