"""What a running agent does now, in a small file of its home, for `edgefl agent status`.

The file is written at changes, at most once a second, and is only valid while the process in it runs.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgefl.errors import ProtocolError
from edgefl.logs import event
from edgefl.protocols.fields import Checked, from_json, parse_json, prose

FILE = "live.json"
PAUSE_S = 1.0  # between two writes

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveState(Checked):
    """What an agent does now."""

    pid: int
    cloud_reachable: bool = False  # by gRPC
    broker_fault: str = dataclasses.field(default="", metadata=prose())  # why there is no MQTT; empty = there is
    parent: str = dataclasses.field(default="", metadata=prose())  # in use: `cloud`, or a region's name
    parent_since_s: float = 0.0  # seconds since 1970
    training_job: str = dataclasses.field(default="", metadata=prose())  # empty = it does not train now
    training_round: int = 0
    policy: str = dataclasses.field(default="", metadata=prose())  # empty = it always works
    policy_refuses: str = dataclasses.field(default="", metadata=prose())  # why it does not work now; empty = it does
    # By model that is shared with a stage server: how it is placed now.
    placements: Mapping[str, str] = dataclasses.field(default_factory=dict)


class LiveFile:
    """Writes the state whenever it has changed. Used in the agent's event loop."""

    def __init__(self, home: Path, measure: Callable[[], LiveState]) -> None:
        self._path, self._measure = home / FILE, measure
        self._changed = asyncio.Event()
        self._changed.set()

    def note_change(self) -> None:
        """Have the state written soon."""
        self._changed.set()

    async def run(self) -> None:
        """Write until cancelled."""
        written: LiveState | None = None
        while True:
            await self._changed.wait()
            self._changed.clear()
            if (state := self._measure()) != written:
                written = self._write(state)
            await asyncio.sleep(PAUSE_S)

    def _write(self, state: LiveState) -> LiveState | None:
        part = self._path.with_name(f".{FILE}.{os.getpid()}")
        try:
            part.write_text(json.dumps(dataclasses.asdict(state)), encoding="utf-8")
            part.replace(self._path)
        except OSError as error:  # a full disk: only `edgefl agent status` knows less
            event(_log, logging.DEBUG, "live.not_written", reason=error)
            return None
        return state


def read_live(home: Path, pid: int) -> LiveState | None:
    """Return what the agent with this process id wrote last; None if there is nothing of it."""
    try:
        state = from_json(LiveState, parse_json((home / FILE).read_bytes()))
    except (OSError, ProtocolError):
        return None
    return state if state.pid == pid else None
