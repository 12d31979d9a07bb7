"""The names of a population's clients: a sequence of a million names that stores none of them.

Invariant: the names are in sorted order, so that a cohort drawn by position is a cohort drawn by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload


class Names(Sequence[str]):
    """`prefix` and a number, padded with zeros to equal length: client-000 .. client-999."""

    in_order = True

    def __init__(self, count: int, prefix: str = "client-") -> None:
        self._count, self._prefix = count, prefix
        self._digits = len(str(max(count - 1, 0)))

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(f"client {index} of {self._count}")
        return f"{self._prefix}{index % self._count:0{self._digits}d}"

    def __contains__(self, name: object) -> bool:
        return self._position(name) is not None

    def index(self, value: Any, start: int = 0, stop: int | None = None) -> int:
        """Return a name's position, without a search; raises ValueError for a name that is not there."""
        position = self._position(value)
        if position is None or not start <= position < (self._count if stop is None else stop):
            raise ValueError(f"{value!r} is not a client of this population: {self._describe()}")
        return position

    def _position(self, name: object) -> int | None:
        if not isinstance(name, str) or not name.startswith(self._prefix):
            return None
        digits = name[len(self._prefix) :]
        if len(digits) != self._digits or not (digits.isascii() and digits.isdigit()):
            return None
        return int(digits) if int(digits) < self._count else None

    def _describe(self) -> str:
        return f"{self[0]} .. {self[-1]}" if self._count else "it is empty"


class KnownNames(Sequence[str]):
    """Names from the data, e.g. of its authors; sorted, with index lookup without a search."""

    in_order = True

    def __init__(self, names: Sequence[str]) -> None:
        self._names = sorted(set(names))
        self._positions = {name: position for position, name in enumerate(self._names)}

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._names[index]

    def __contains__(self, name: object) -> bool:
        return name in self._positions

    def index(self, value: Any, start: int = 0, stop: int | None = None) -> int:
        """Return a name's position; raises ValueError for a name that is not there."""
        position = self._positions.get(value)
        if position is None or not start <= position < (len(self._names) if stop is None else stop):
            raise ValueError(f"{value!r} is not a client of this population of {len(self._names)}")
        return position
