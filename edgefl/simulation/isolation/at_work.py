"""What user code a process is in, noted where the process that watches it can read it, whatever becomes of it.

The note lies in memory that both map, so that it is there after `os._exit`, a signal, or a fault of a native
library. A process that nobody watches notes nothing.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass

from edgefl.errors import TaskError
from edgefl.simulation.engines.shared import new_file
from edgefl.task import UserCode

_TEXT_BYTES = 254  # of each of the two; one byte more says how many
_NOT_A_CLIENTS = ("test_data", "reading test_data", "evaluation", "model", "initial", "importing")
_OF_A_STACK = ("stacked training",)


@dataclass(frozen=True, slots=True)
class AtWork:
    """What a process was doing, and whose turn it was."""

    doing: str = ""  # a word of `UserCode`: train_data, local training, ..; empty: nothing of the user's
    client: str = ""

    @property
    def of_a_client(self) -> bool:
        """Whether it is the client's own doing."""
        return bool(self.client and self.doing) and not self.doing.startswith((*_NOT_A_CLIENTS, *_OF_A_STACK))

    @property
    def of_a_stack(self) -> bool:
        """Whether many clients were at work as one."""
        return self.doing.startswith(_OF_A_STACK)


class Cell:
    """The memory of the note."""

    def __init__(self, descriptor: int | None = None) -> None:
        size = 2 * (1 + _TEXT_BYTES)
        self.descriptor = new_file(size) if descriptor is None else descriptor
        self._memory = mmap.mmap(self.descriptor, size)

    def doing(self, text: str) -> None:
        """Note what is done, empty where nothing of the user's is."""
        said = text.encode(errors="replace")[:_TEXT_BYTES]
        self._memory[: 1 + len(said)] = bytes((len(said),)) + said

    def client(self, name: str) -> None:
        """Note whose turn it is."""
        said = name.encode(errors="replace")[:_TEXT_BYTES]
        self._memory[1 + _TEXT_BYTES : 2 + _TEXT_BYTES + len(said)] = bytes((len(said),)) + said

    def read(self) -> AtWork:
        """Return what was noted last."""
        return AtWork(self._text(0), self._text(1 + _TEXT_BYTES))

    def clear(self) -> None:
        """Note that nothing is done, and that it is nobody's turn."""
        self.doing("")
        self.client("")

    def close(self) -> None:
        os.close(self.descriptor)

    def _text(self, start: int) -> str:
        length = self._memory[start]
        return self._memory[start + 1 : start + 1 + length].decode(errors="replace")


class _Here:
    """What this process notes, if it is watched."""

    cell: Cell | None = None
    failed: Mapping[str, str] = {}


def watch(cell: Cell, failed: Mapping[str, str]) -> None:
    """Note in this cell from now on; clients that have ended a process too often are given with how."""
    cell.clear()
    _Here.cell, _Here.failed = cell, dict(failed)
    UserCode.on_change = cell.doing


def turn_of(client: str) -> None:
    """Note whose turn it is; raises TaskError for a client that is not to be tried again."""
    if _Here.cell is None:
        return
    if reason := _Here.failed.get(client):
        raise TaskError(reason)
    _Here.cell.client(client)
