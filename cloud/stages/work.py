"""A request for inference in the cloud, and its parts.

A request with more rows than a batch takes is cut into parts, so that they are in several stages at the same time.
Invariant: a request is settled once, by its result or by a `RequestRefused`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from edgefl.trees import Array

Output = tuple[str, str, tuple[int, ...], bytes]  # name, datatype, shape, raw bytes


class RequestRefused(Exception):
    """A request that gets no result: the name of a gRPC status code, and the reason."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(eq=False, slots=True)
class Part:
    """Some rows of a request: what is queued, and merged with parts of others into a batch."""

    request: StageRequest
    number: int  # among the parts of its request
    tensors: Mapping[str, Array]
    rows: int
    cost: int  # bytes of its tensors: its share of a device's turn
    turn: tuple[float, int] = (0.0, 0)  # its virtual start time in the queue, and what decides between equal ones
    alone: bool = False  # it is not merged with others
    is_queued: bool = False

    @property
    def key(self) -> Hashable:
        """Parts of the same key may be rows of one batch."""
        return tuple((name, array.dtype.num, array.shape[1:]) for name, array in self.tensors.items())


@dataclass(eq=False, slots=True)
class StageRequest:
    """One request of a device. `deadline_s` is a time on the event loop's clock."""

    device: str
    tensors: Mapping[str, Array]
    arrived_s: float
    deadline_s: float = math.inf
    entry: int = 0  # the stage at which it begins
    settled: asyncio.Future[list[Output]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    parts: list[Part] = field(default_factory=list)
    results: dict[int, list[Output]] = field(default_factory=dict)  # by part

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.tensors.values())

    @property
    def is_over(self) -> bool:
        return self.settled.done()

    def divide(self, max_rows: int, *, merges: bool) -> None:
        """Make the parts: of `max_rows` each if the rows are independent of each other, otherwise one."""
        rows = next(iter(self.tensors.values())).shape[0] if merges and self.tensors else 1
        if not merges or rows <= max_rows:
            self.parts = [Part(self, 0, self.tensors, rows, self.num_bytes, alone=not merges or rows == 0)]
            return
        for number, first in enumerate(range(0, rows, max_rows)):
            some = {name: array[first : first + max_rows] for name, array in self.tensors.items()}
            cost = sum(array.nbytes for array in some.values())
            self.parts.append(Part(self, number, some, min(max_rows, rows - first), cost))

    def take_result(self, part: Part, outputs: list[Output]) -> None:
        """Keep the result of a part; the last one settles the request."""
        self.results[part.number] = outputs
        if not self.is_over and len(self.results) == len(self.parts):
            self.settled.set_result(_joined([self.results[number] for number in range(len(self.parts))]))

    def refuse(self, status: str, reason: str) -> None:
        """Settle the request without a result, unless it is settled."""
        if not self.is_over:
            self.settled.set_exception(RequestRefused(status, reason))
            self.settled.exception()  # marked as seen: its client may be gone


def _joined(results: Sequence[list[Output]]) -> list[Output]:
    if len(results) == 1:
        return results[0]
    joined = []
    for same in zip(*results, strict=True):
        name, datatype, shape, _ = same[0]
        rows = sum(one[2][0] for one in same)
        joined.append((name, datatype, (rows, *shape[1:]), b"".join(one[3] for one in same)))
    return joined
