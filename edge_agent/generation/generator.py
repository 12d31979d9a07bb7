"""Tokens by the head on this device and its tail in the cloud, whatever happens to the tail.

What was sent of a text is kept, in the format of the cut. If the tail's process ends, its server restarts, the lease
is over or the connection is lost, the sequence is begun again with exactly these bytes. A choice depends on the seed
and the position alone. So the tokens are those of an undisturbed run.
A head that is the whole model needs no tail.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from edge_agent.generation.api_error import ApiError
from edge_agent.generation.tail_link import TailLink, TailLost, TailRefused, TailStream
from edgefl.errors import ProtocolError
from edgefl.offload.generation.blocks import DecoderPart, Rows, SequenceCache
from edgefl.offload.generation.generate import PREFILL_ROWS
from edgefl.offload.generation.sampling import Sampling, choose
from edgefl.protocols.backoff import Backoff
from edgefl.protocols.inference.sequences import SequenceRequest, encode_hidden
from edgefl.trees import Array

_T = TypeVar("_T")
STALL_S = 90.0  # without a token; then the text ends with an error
STEP_S = 75.0  # for one response of the tail; its own limit for a step is shorter
_BEGIN_AGAIN = frozenset({"ABORTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"})
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TextJob:
    """What to generate."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling


class Generator:
    """The head in memory, used by one thread of `worker`, and the way to its tail."""

    def __init__(self, head: DecoderPart, worker: Executor, link: TailLink | None, form: str = "fp16") -> None:
        self._head, self._worker, self._link, self._form = head, worker, link, form
        self._ending: set[asyncio.Task[None]] = set()
        self.num_replays = 0

    async def tokens(self, job: TextJob) -> AsyncGenerator[int, None]:
        """Yield up to `max_tokens` tokens; raises ApiError if no more can be had."""
        cache, given = self._head.new_cache(), list(job.prompt)
        sequence = None if self._link is None else _Sequence(self, self._link, job)
        try:
            for _ in range(job.max_tokens):
                rows = await self._computed(cache, given)
                if sequence is None:
                    token = await self._run(self._chosen, rows[-1], job.sampling, cache.length)
                else:
                    token = await sequence.next_token([self._encoded(one) for one in rows])
                yield token
                given = [token]
        finally:
            if sequence is not None:
                self._end(sequence)

    async def close(self) -> None:
        """Wait until the tail knows of the ended texts."""
        if self._ending:
            await asyncio.wait(self._ending)

    async def _computed(self, cache: SequenceCache, tokens: Sequence[int]) -> list[Array]:
        """Return the hidden states (T, E) of tokens, in pieces."""
        try:
            return [
                await self._run(self._through_head, cache, tokens[at : at + PREFILL_ROWS])
                for at in range(0, len(tokens), PREFILL_ROWS)
            ]
        except MemoryError as cause:
            raise ApiError(503, "this device has too little memory for the keys and values of this text; send a "
                                "shorter prompt, or one text at a time", code="out_of_memory") from cause  # fmt: skip

    def _through_head(self, cache: SequenceCache, tokens: Sequence[int]) -> Array:
        hidden: Array = self._head.run(self._head.embed(tokens), [Rows(cache, len(tokens))])
        return hidden

    def _chosen(self, hidden: Array, sampling: Sampling, position: int) -> int:
        return choose(self._head.logits(hidden[-1:])[0], sampling, position)

    def _encoded(self, hidden: Array) -> Array:
        try:
            return encode_hidden(hidden, self._form)
        except ProtocolError as cause:
            raise ApiError(500, f"{cause}: --generate-format", code="wire_format") from cause

    async def _run(self, work: Callable[..., _T], *given: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work, *given)

    def _end(self, sequence: _Sequence) -> None:
        task = asyncio.get_running_loop().create_task(sequence.end(), name="end-sequence")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


class _Sequence:
    """One text at the tail."""

    def __init__(self, owner: Generator, link: TailLink, job: TextJob) -> None:
        self._owner, self._link, self._job = owner, link, job
        self._name = secrets.token_hex(16)
        self._sent: list[Array] = []  # (T, E) each
        self._length = 0  # rows that the tail has
        self._stream: TailStream | None = None
        self._is_begun = self._has_tokens = False

    async def next_token(self, pieces: Sequence[Array]) -> int:
        """Send rows; return the token behind them, however often the sequence has to begin again for it."""
        loop, pauses = asyncio.get_running_loop(), Backoff(_FIRST_PAUSE_S, _LONGEST_PAUSE_S)
        until_s = loop.time() + STALL_S
        begins = not self._sent
        self._sent.extend(pieces)
        while True:
            try:
                return await (self._begin() if begins else self._continue(pieces))
            except TailLost as error:
                self._drop_stream()
                begins, reason = not self._is_begun or len(pieces) > 1, str(error)
            except TailRefused as error:
                if not self._may_try_again(error):
                    raise _api_error(error) from error
                begins, reason = True, str(error)
            if loop.time() > until_s:
                raise ApiError(
                    503, f"no token within {STALL_S:g} s, {len(self._sent)} requests into the text: {reason}",
                    code="tail_unreachable",
                )  # fmt: skip
            await asyncio.sleep(pauses.next_s())

    async def end(self) -> None:
        """Tell the tail that the text is over."""
        if self._stream is not None:
            empty = self._sent[0][:0]
            request = SequenceRequest(sequence=self._name, hidden=empty, ends=True, position=self._length)
            await self._stream.end(request)

    async def _begin(self) -> int:
        """Begin with all rows."""
        if self._is_begun:
            self._owner.num_replays += 1
        self._length, self._is_begun = 0, True
        rows = np.concatenate(self._sent)
        whole = [rows[at : at + PREFILL_ROWS] for at in range(0, len(rows), PREFILL_ROWS)]
        return await self._continue(whole, starts=True)

    async def _continue(self, pieces: Sequence[Array], *, starts: bool = False) -> int:
        if self._stream is None:
            self._stream = self._link.open()
        token, position = None, self._length
        for number, hidden in enumerate(pieces):
            request = SequenceRequest(
                sequence=self._name, hidden=hidden, starts=starts and not number, position=position,
                max_tokens=len(self._job.prompt) + self._job.max_tokens if starts and not number else 0,
                wants_token=number == len(pieces) - 1, sampling=self._job.sampling,
            )  # fmt: skip
            token = await self._stream.send(request, STEP_S)
            position += len(hidden)
        if token is None:
            raise TailRefused("INTERNAL", "the tail's response has no token")
        self._length, self._has_tokens = position, True
        return token

    def _may_try_again(self, error: TailRefused) -> bool:
        """Whether the sequence can begin again: a full tail is an error at first, but not in the middle of a text."""
        return error.status in _BEGIN_AGAIN or (error.status == "RESOURCE_EXHAUSTED" and self._has_tokens)

    def _drop_stream(self) -> None:
        if self._stream is not None:
            self._stream.cancel()
            self._stream = None


def _api_error(error: TailRefused) -> ApiError:
    if error.status == "RESOURCE_EXHAUSTED":
        return ApiError(429, f"the tail has no room: {error}", kind="rate_limit_error", code="tail_full")
    if error.status == "FAILED_PRECONDITION":
        return ApiError(503, f"the tail does not fit this head: {error}", code="tail_of_another_split")
    if error.status == "INVALID_ARGUMENT":
        return ApiError(400, f"the tail refused the request: {error}", code="tail_refused")
    return ApiError(503, f"the tail refused this device ({error.status}): {error}", code="tail_refused")
