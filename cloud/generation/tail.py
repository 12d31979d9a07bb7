"""The tail of a language model: admits requests to sequences, schedules them, and has steps computed.

Invariants: a request is settled once, by its token or by a `RequestRefused`; one step is computed at a time; when the
process ends, all sequences are gone, and each device begins its own again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from cloud.beside.suspects import Suspects
from cloud.generation.schedule import Piece, StepSchedule, Turn
from cloud.generation.sessions import SessionLimits, TailSequence, TailSequences
from cloud.generation.tail_process import TailProcess, TailSpec
from cloud.generation.wire import RunStep, StepDone, StepItem
from cloud.servers import unwrapped
from cloud.stages.work import RequestRefused
from edgefl.errors import ConfigError, ProtocolError
from edgefl.logs import event
from edgefl.protocols.inference.sequences import SequenceRequest
from edgefl.protocols.inference.tensors import datatype_of

_CHECK_S = 1.0  # between two looks at the leases

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TailLimits:
    """What one step may have."""

    max_sequences: int = 32  # whose single tokens are computed together
    prompt_rows: int = 256


class LanguageTail:
    """One tail. Used in the event loop only."""

    def __init__(
        self, spec: TailSpec, limits: TailLimits, sessions: SessionLimits,
        make_process: Callable[..., Any] = TailProcess,
    ) -> None:  # fmt: skip
        self._limits = limits
        self.sessions = TailSequences(sessions)
        self._loop = asyncio.get_running_loop()
        self._schedule = StepSchedule(limits.max_sequences, limits.prompt_rows)
        self._suspects = Suspects(self._loop.time)
        self._process = make_process(spec, self)
        self._steps = itertools.count(1)
        self._running: list[Piece] = []
        self._dropped: list[int] = []  # keys whose caches the process may free
        self._timer: asyncio.TimerHandle | None = None

    @property
    def reason(self) -> str:
        """Why nothing is computed now; empty = it is ready."""
        return str(self._process.reason)

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the tail within the block; raises ConfigError if it cannot be loaded."""
        try:
            with unwrapped():
                async with asyncio.TaskGroup() as group:  # if a task fails, which is a bug, the block is cancelled
                    tasks = [
                        group.create_task(self._process.run(), name="tail"),
                        group.create_task(self._end_leases(), name="leases"),
                    ]
                    try:
                        await self._load()
                        yield
                    finally:
                        for task in tasks:
                            task.cancel()
        finally:
            self._end_timer()
            self._refuse_all("UNAVAILABLE", "the stage server is stopping; begin the sequence again, or elsewhere")

    async def submit(self, device: str, request: SequenceRequest) -> int | None:
        """Compute the rows of a request; return the next token, or None if none is wanted.

        Raises RequestRefused: ABORTED and UNAVAILABLE mean that the sequence has to begin again.
        """
        if refusal := self._suspects.refusal(device):
            raise RequestRefused("RESOURCE_EXHAUSTED", refusal)
        session = self._session(device, request)
        again = (request.position, len(request.hidden))
        if not request.starts and session.last is not None and session.last[:2] == again:
            return session.last[2]  # the response was lost
        self._check(session, request)
        if not len(request.hidden):
            self._end(session)
            return None
        turn = Turn(
            session, request.hidden, request.sampling, request.starts or len(request.hidden) > 1, request.wants_token,
            is_suspect=self._suspects.are_alone(device),
        )  # fmt: skip
        session.is_busy = True
        self._schedule.put(turn, self._loop.time())
        self._pump()
        try:
            token = await turn.settled
        except asyncio.CancelledError:
            self._give_up(turn)
            raise
        if request.ends:
            self._end(session)
        return token

    def orphan(self, device: str) -> None:
        """Shorten the leases of a device that has no stream any more."""
        self.sessions.orphan(device, self._loop.time())

    # What the process says

    def came_up(self) -> None:
        self._dropped.clear()
        self._pump()

    def done(self, result: StepDone) -> None:
        if {len(result.tokens), len(result.errors)} != {len(self._running)}:
            raise ProtocolError(
                f"the tail's process has results of {len(result.tokens)} sequences, expected {len(self._running)}"
            )
        pieces, self._running = self._running, []
        now_s, answered = self._loop.time(), []
        for piece, token, error in zip(pieces, result.tokens, result.errors, strict=True):
            turn, session = piece.turn, piece.turn.session
            if error:
                self._fail(turn, "RESOURCE_EXHAUSTED" if result.lacks_memory else "ABORTED", error)
                continue
            session.length += piece.num
            turn.num_done += piece.num
            if turn.num_left or turn.is_over:
                if turn.is_over:
                    session.is_busy = False
                continue
            session.is_busy = False
            if token is not None:
                answered.append(session.key)
                session.last = (session.length - len(turn.hidden), len(turn.hidden), token)
            turn.is_over = True
            if not turn.settled.done():
                turn.settled.set_result(token)
        self._schedule.note_step(answered, result.seconds, now_s)
        self._pump()

    def lost(self, reason: str) -> None:
        pieces, self._running = self._running, []
        prompts = {one.turn.session.device for one in pieces if one.turn.is_prompt}
        if prompts:  # single tokens have no size that could end a process
            self._suspects.note_death(sorted(prompts))
        for piece in pieces:
            self._refuse(piece.turn, "UNAVAILABLE", f"the tail's process ended: {reason}. Begin the sequence again")
        self._refuse_all("UNAVAILABLE", f"the tail's process ended: {reason}. Begin the sequence again")

    def _session(self, device: str, request: SequenceRequest) -> TailSequence:
        if not request.starts:
            return self.sessions.find(device, request.sequence, self._loop.time())
        former = self.sessions.get(device, request.sequence)
        if len(request.hidden) > request.max_tokens:
            raise RequestRefused(
                "INVALID_ARGUMENT", f"the request has {len(request.hidden)} rows; max_tokens is {request.max_tokens}"
            )
        session = self.sessions.start(device, request.sequence, request.max_tokens, self._loop.time())
        if former is not None:
            self._replace(former)
        return session

    def _replace(self, former: TailSequence) -> None:
        """Refuse what is still to be computed of a sequence that begins again: its connection was lost."""
        for turn in [*self._schedule.turns, *(piece.turn for piece in self._running)]:
            if turn.session is former:
                self._schedule.remove(turn)
                self._refuse(turn, "ABORTED", "the sequence was begun again")
        self._free(former)

    def _check(self, session: TailSequence, request: SequenceRequest) -> None:
        name = f"sequence {request.sequence[:80]!r}"
        if session.is_busy:
            raise RequestRefused(
                "ABORTED", f"{name} is being computed; wait for its response, or begin it again with all its rows"
            )
        if request.position != session.length:
            raise RequestRefused(
                "ABORTED",
                f"{name} has {session.length} tokens here, the request continues behind {request.position}. Begin it "
                "again with all its rows",
            )
        if session.length + len(request.hidden) > session.max_tokens:
            raise RequestRefused(
                "INVALID_ARGUMENT",
                f"{name} was begun with max_tokens {session.max_tokens}; with these rows it would have "
                f"{session.length + len(request.hidden)}",
            )

    def _pump(self) -> None:
        """Have the next step computed, if there is one and the process is free."""
        self._end_timer()
        if self._running or not self._process.is_up or not len(self._schedule):
            return
        if (wait_s := self._schedule.wait_s(self._loop.time())) > 0:
            self._timer = self._loop.call_later(wait_s, self._pump)
            return
        self._running = self._schedule.pick()
        items, bodies = [], []
        for piece in self._running:
            turn = piece.turn
            rows = turn.hidden[turn.num_done : turn.num_done + piece.num]
            bodies.append(rows.tobytes())
            items.append(StepItem(
                key=turn.session.key, num=piece.num, datatype=datatype_of(rows.dtype), position=turn.session.length,
                room=turn.session.max_tokens, wants_token=turn.wants_token and piece.is_last,
                temperature=turn.sampling.temperature,
                top_p=turn.sampling.top_p, seed=turn.sampling.seed,
            ))  # fmt: skip
        dropped, self._dropped = self._dropped, []
        self._process.send(RunStep(next(self._steps), items, dropped), b"".join(bodies))

    async def _load(self) -> None:
        try:
            await self._process.first_load
        except ProtocolError as cause:
            raise ConfigError(str(cause)) from cause

    async def _end_leases(self) -> None:
        while True:
            await asyncio.sleep(_CHECK_S)
            for session in self.sessions.take_expired(self._loop.time()):
                event(_log, logging.INFO, "sequence.expired", device=session.device, tokens=session.length)
                self._free(session)

    def _end(self, session: TailSequence) -> None:
        self.sessions.end(session)
        self._free(session)

    def _free(self, session: TailSequence) -> None:
        """Free the cache of a sequence with the next step."""
        self._dropped.append(session.key)
        self._schedule.forget(session.key)

    def _give_up(self, turn: Turn) -> None:
        """Forget a turn whose client is gone; rows that are computed now stay in the cache."""
        turn.is_over = True
        self._schedule.remove(turn)
        if not any(piece.turn is turn for piece in self._running):
            turn.session.is_busy = False

    def _fail(self, turn: Turn, status: str, reason: str) -> None:
        """Refuse a turn, and forget its sequence: its cache is not what the device believes."""
        self._schedule.remove(turn)
        self._end(turn.session)
        self._refuse(turn, status, reason)

    def _refuse(self, turn: Turn, status: str, reason: str) -> None:
        turn.is_over, turn.session.is_busy = True, False
        if not turn.settled.done():
            turn.settled.set_exception(RequestRefused(status, reason))
            turn.settled.exception()  # marked as seen: its client may be gone

    def _refuse_all(self, status: str, reason: str) -> None:
        for turn in self._schedule.take_all():
            self._refuse(turn, status, reason)
        self.sessions.clear()

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
