"""What the tail computes next: prompts and single tokens apart, in fair turns of the devices.

A step is either some rows of prompts, or the next token of each sequence that waits for one. They alternate, so a long
prompt delays the others' tokens by one step at a time, and a new sequence joins between two steps (continuous
batching, Yu et al. 2022; chunks of prompts, Agrawal et al. 2023). Devices take turns by the rows that were computed
for them (start-time fair queueing, as in `cloud.stages.fair_queue`).
Sequences whose device is about to send again are waited for, at most a quarter of a step: otherwise they would fall
into two halves that never meet. Pure: the clock is an argument.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from cloud.generation.sessions import TailSequence
from edgefl.offload.generation.sampling import Sampling
from edgefl.trees import Array

_WAITED_SHARE = 0.25  # of the last step's time
_KEPT = 0.7  # of the former mean, in the mean time that a device takes between two requests


@dataclass(eq=False, slots=True)
class Turn:
    """A request that waits: rows of one sequence. `settled` gets the token, or None if none is wanted."""

    session: TailSequence
    hidden: Array  # (T, E)
    sampling: Sampling
    is_prompt: bool
    wants_token: bool
    settled: asyncio.Future[int | None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    num_done: int = 0
    is_suspect: bool = False  # computed alone
    is_over: bool = False

    @property
    def num_left(self) -> int:
        return len(self.hidden) - self.num_done


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a turn in a step."""

    turn: Turn
    num: int

    @property
    def is_last(self) -> bool:
        return self.num == self.turn.num_left


@dataclass(slots=True)
class _Pace:
    """When a sequence's device was answered last, and how long it takes to send again."""

    answered_s: float
    mean_s: float | None = None


class StepSchedule:
    """Waiting turns of all devices."""

    def __init__(self, max_sequences: int, prompt_rows: int) -> None:
        self._max_sequences, self._prompt_rows = max_sequences, prompt_rows
        self._turns: list[Turn] = []
        self._virtual = 0.0
        self._finish: dict[str, float] = {}
        self._was_prompt = False
        self._paces: dict[int, _Pace] = {}
        self._ready_s = 0.0  # since when a single token waits
        self._free_s = 0.0  # since when nothing is computed
        self._step_s = 0.0  # time of the last step of single tokens

    def __len__(self) -> int:
        return len(self._turns)

    def put(self, turn: Turn, now_s: float) -> None:
        """Add a turn."""
        if (pace := self._paces.get(turn.session.key)) is not None:
            seen = now_s - pace.answered_s
            pace.mean_s = seen if pace.mean_s is None else _KEPT * pace.mean_s + (1 - _KEPT) * seen
        if not turn.is_prompt and not any(not one.is_prompt for one in self._turns):
            self._ready_s = now_s
        self._turns.append(turn)

    @property
    def turns(self) -> list[Turn]:
        """The turns that wait, also those of which some rows are computed."""
        return list(self._turns)

    def remove(self, turn: Turn) -> None:
        """Take a turn out, if it waits."""
        if turn in self._turns:
            self._turns.remove(turn)

    def take_all(self) -> list[Turn]:
        """Take out all turns."""
        turns, self._turns = self._turns, []
        return turns

    def wait_s(self, now_s: float) -> float:
        """Return how long the next step should wait for sequences that are about to come."""
        tokens = [one for one in self._turns if not one.is_prompt]
        if len(tokens) < len(self._turns) or not tokens or len(tokens) >= self._max_sequences:
            return 0.0
        here = {one.session.key for one in tokens}
        limit_s = max(self._ready_s, self._free_s) + _WAITED_SHARE * self._step_s
        expected = [
            pace.answered_s + pace.mean_s
            for key, pace in self._paces.items()
            if key not in here and pace.mean_s is not None
        ]
        soon = [one for one in expected if now_s < one <= limit_s]
        return max(soon) - now_s if soon else 0.0

    def pick(self) -> list[Piece]:
        """Return the next step; its turns are out of the queue, but for those with rows left."""
        tokens, prompts = self._split()
        self._was_prompt = bool(prompts) and (not tokens or not self._was_prompt)
        pieces = self._prompts(prompts) if self._was_prompt else [Piece(one, 1) for one in tokens]
        for piece in pieces:
            device = piece.turn.session.device
            start = max(self._virtual, self._finish.get(device, 0.0))
            self._finish[device] = start + piece.num
            if piece.is_last:
                self._turns.remove(piece.turn)
        if pieces:
            waiting = {one.session.device for one in self._turns}
            self._virtual = min((self._finish[one] for one in waiting if one in self._finish), default=self._virtual)
            self._finish = {one: at for one, at in self._finish.items() if one in waiting or at > self._virtual}
        return pieces

    def note_step(self, keys: Sequence[int], seconds: float, now_s: float) -> None:
        """Note that sequences got their tokens."""
        self._free_s = now_s
        if not self._was_prompt:
            self._step_s = seconds
        for key in keys:
            self._paces.setdefault(key, _Pace(now_s)).answered_s = now_s

    def forget(self, key: int) -> None:
        """Expect no more of a sequence."""
        self._paces.pop(key, None)

    def _split(self) -> tuple[list[Turn], list[Turn]]:
        """Return the single tokens and the prompts that may be next, in the order of the devices' turns."""
        ordered = sorted(self._turns, key=lambda one: self._finish.get(one.session.device, 0.0))
        tokens = [one for one in ordered if not one.is_prompt][: self._max_sequences]
        return tokens, [one for one in ordered if one.is_prompt]

    def _prompts(self, prompts: Sequence[Turn]) -> list[Piece]:
        pieces: list[Piece] = []
        room = self._prompt_rows
        for turn in prompts:
            if turn.is_suspect and pieces:
                continue
            pieces.append(Piece(turn, min(room, turn.num_left)))
            room -= pieces[-1].num
            if turn.is_suspect or not room:
                break
        return pieces
