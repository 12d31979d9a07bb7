"""Which user code a process is running, recorded so that another process can read it after a crash.

The record is in memory that both processes map, so that it survives `os._exit`, a signal, or a crash of a native
library. A process that is not watched records nothing.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass

from edgefl.errors import TaskError
from edgefl.simulation.engines.shared import new_file
from edgefl.task import UserCode

_TEXT_BYTES = 254  # of each of the two texts; one more byte holds the length
_NOT_A_CLIENTS = ("test_data", "reading test_data", "evaluation", "model", "initial", "importing")
_OF_A_STACK = ("stacked training",)


@dataclass(frozen=True, slots=True)
class AtWork:
    """What a process was doing, and for which client."""

    doing: str = ""  # as in `UserCode`: train_data, local training, ..; empty: no user code
    client: str = ""

    @property
    def of_a_client(self) -> bool:
        """Whether it was code of one client."""
        return bool(self.client and self.doing) and not self.doing.startswith((*_NOT_A_CLIENTS, *_OF_A_STACK))

    @property
    def of_a_stack(self) -> bool:
        """Whether a stack of clients was being trained."""
        return self.doing.startswith(_OF_A_STACK)


class Cell:
    """The shared memory of the record."""

    def __init__(self, descriptor: int | None = None) -> None:
        size = 2 * (1 + _TEXT_BYTES)
        self.descriptor = new_file(size) if descriptor is None else descriptor
        self._memory = mmap.mmap(self.descriptor, size)

    def doing(self, text: str) -> None:
        """Record what is done; empty: no user code."""
        said = text.encode(errors="replace")[:_TEXT_BYTES]
        self._memory[: 1 + len(said)] = bytes((len(said),)) + said

    def client(self, name: str) -> None:
        """Record the current client."""
        said = name.encode(errors="replace")[:_TEXT_BYTES]
        self._memory[1 + _TEXT_BYTES : 2 + _TEXT_BYTES + len(said)] = bytes((len(said),)) + said

    def read(self) -> AtWork:
        """Return the last record."""
        return AtWork(self._text(0), self._text(1 + _TEXT_BYTES))

    def clear(self) -> None:
        """Record that nothing is done, for no client."""
        self.doing("")
        self.client("")

    def close(self) -> None:
        os.close(self.descriptor)

    def _text(self, start: int) -> str:
        length = self._memory[start]
        return self._memory[start + 1 : start + 1 + length].decode(errors="replace")


class _Here:
    """The record of this process, if it is watched."""

    cell: Cell | None = None
    failed: Mapping[str, str] = {}


def watch(cell: Cell, failed: Mapping[str, str]) -> None:
    """Record into this cell from now on; `failed` has the clients that ended a process too often, and how."""
    cell.clear()
    _Here.cell, _Here.failed = cell, dict(failed)
    UserCode.on_change = cell.doing


def turn_of(client: str) -> None:
    """Record the current client; raises TaskError for a client that must not be tried again."""
    if _Here.cell is None:
        return
    if reason := _Here.failed.get(client):
        raise TaskError(reason)
    _Here.cell.client(client)
