"""Where a round of a region stands, if it has several for one of its parent: kept through a kill.

What devices send for a regional round was trained from its model and no other. Computed again, that model may be
another: a device may have come back meanwhile. So it is noted before it is asked for.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgefl.aggregation.regional import regional_round
from edgefl.process.durable import flush
from edgefl.process.home import replace_file

Key = tuple[str, int]  # job, round of the parent
SUFFIX = ".regional"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reached:
    """The regional round that is open, and what belongs to the round so far."""

    first: str  # SHA-256 of the parent's model
    regional: int  # from 0
    region_rounds: int
    models: list[str]  # of the region, by SHA-256; the last one is that of the open regional round

    def numbers(self, number: int) -> list[int]:
        """Return the numbers of the devices' rounds until the open one, in the parent's round `number`."""
        return [regional_round(number, one, self.region_rounds) for one in range(self.regional + 1)]


class RegionalNotes:
    """The notes of one region, a file each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: Key) -> Reached | None:
        """Return what is noted of a round."""
        try:
            return Reached(**json.loads(self._file(key).read_bytes()))
        except FileNotFoundError:
            return None

    def put(self, key: Key, reached: Reached) -> None:
        """Note it durably; raises OSError."""
        replace_file(self._file(key), json.dumps(dataclasses.asdict(reached)).encode())
        flush(self._folder)

    def drop(self, key: Key) -> None:
        """Delete the note of a round, if there is one."""
        self._file(key).unlink(missing_ok=True)

    def noted(self) -> Iterator[Key]:
        """Yield the rounds of which something is noted."""
        for path in list(self._folder.glob(f"*{SUFFIX}")):
            job, _, number = path.stem.rpartition("-")
            yield job, int(number)

    def _file(self, key: Key) -> Path:
        return self._folder / f"{key[0]}-{key[1]}{SUFFIX}"
