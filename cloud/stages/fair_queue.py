"""The queue before the first stage: fair between devices, and what it hands out is merged into batches.

Start-time fair queueing (Goyal, Vin and Cheng 1996, section 2): a part's start is the later one of the queue's
virtual time and of its device's last finish, which is that part's start plus its bytes; the least start is next. So
two devices that both wait get the same number of bytes, up to one part each, whatever they send and how often.
Pure: no clock and no I/O. Invariant: `len` is the number of parts that were put in and neither taken nor removed.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from dataclasses import dataclass

from cloud.stages.work import Part

_MAX_PASSED_OVER = 64  # parts of other shapes that a batch looks past
_MAX_IDLE = 256  # devices without a part whose last finish is kept
_MAX_REMOVED = 256  # parts that were removed and whose place in the heap is kept


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRule:
    """When waiting parts are a batch."""

    max_rows: int = 32
    max_bytes: int = 64 << 20
    max_wait_s: float = 0.0  # for more rows, while the stage is idle


class FairQueue:
    """Waiting parts of all devices."""

    def __init__(self, rule: BatchRule) -> None:
        self._rule = rule
        self.due_s = 0.0  # when the parts that `take` left waiting are due
        # A heap; parts that were removed stay until they are met.
        self._order: list[tuple[tuple[float, int], int, Part]] = []
        self._numbers = itertools.count()
        self._virtual = 0.0
        self._finish: dict[str, float] = {}
        self._waiting: Counter[str] = Counter()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, part: Part) -> None:
        """Add a part."""
        device = part.request.device
        start = max(self._virtual, self._finish.get(device, 0.0))
        self._finish[device] = start + max(part.cost, 1)
        part.turn = start, next(self._numbers)
        self._push(part)
        self._waiting[device] += 1

    def put_back(self, part: Part) -> None:
        """Add a part that was taken before, at its former place."""
        self._push(part)
        self._waiting[part.request.device] += 1

    def remove(self, part: Part) -> None:
        """Remove a part, if it waits."""
        if part.is_queued:
            self._leave(part)
            if len(self._order) > 2 * len(self) + _MAX_REMOVED:  # nothing is taken while a stage is down
                self._order = [entry for entry in self._order if entry[2].is_queued]
                heapq.heapify(self._order)

    def take(self, now_s: float, *, is_idle: bool) -> list[Part]:
        """Return the parts of the next batch, the first one's device being the one whose turn it is; [] if none is due.

        `is_idle` says whether the first stage computes nothing.
        """
        batch: list[Part] = []
        met: list[tuple[tuple[float, int], int, Part]] = []  # entries that were popped
        rows = num_bytes = 0
        is_full = False
        while self._order and not is_full and len(met) - len(batch) < _MAX_PASSED_OVER:
            entry = heapq.heappop(self._order)
            part = entry[2]
            if not part.is_queued:
                continue
            met.append(entry)
            if batch and (part.alone or part.key != batch[0].key):
                continue
            fits = rows + part.rows <= self._rule.max_rows and num_bytes + part.cost <= self._rule.max_bytes
            if fits or not batch:
                batch.append(part)
                rows, num_bytes = rows + part.rows, num_bytes + part.cost
            is_full = not fits or part.alone or rows == self._rule.max_rows
        if not batch or not (is_full or self._is_due(batch, now_s, is_idle=is_idle)):
            batch = []
        for part in batch:
            self._virtual = max(self._virtual, part.turn[0])
            self._leave(part)
        for entry in met:
            if entry[2].is_queued:
                heapq.heappush(self._order, entry)
        self._forget_idle()
        return batch

    def _is_due(self, batch: list[Part], now_s: float, *, is_idle: bool) -> bool:
        """Whether a batch that may grow is due. While the stage computes, it is not: it would wait in the process."""
        self.due_s = min(part.request.arrived_s for part in batch) + self._rule.max_wait_s
        return is_idle and now_s >= self.due_s

    def _push(self, part: Part) -> None:
        part.is_queued = True
        self._count += 1
        heapq.heappush(self._order, (part.turn, next(self._numbers), part))

    def _leave(self, part: Part) -> None:
        part.is_queued = False
        self._count -= 1
        device = part.request.device
        self._waiting[device] -= 1
        if not self._waiting[device]:
            del self._waiting[device]

    def _forget_idle(self) -> None:
        """Forget devices that have had their turn: a new part of theirs starts at the virtual time anyway."""
        if not self._waiting:  # the end of a busy period: all are equal again
            self._virtual, self._finish = 0.0, {}
        elif len(self._finish) > len(self._waiting) + _MAX_IDLE:
            self._finish = {
                device: finish
                for device, finish in self._finish.items()
                if device in self._waiting or finish > self._virtual
            }
