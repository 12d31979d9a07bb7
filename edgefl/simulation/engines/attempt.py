"""An engine's fault, contained: it is logged and kept as text, so that another engine can continue in its place."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Self

from edgefl.logs import event
from edgefl.task import MAX_QUOTED

_log = logging.getLogger(__name__)


class Attempt:
    """A context around an engine: its exception is reported, stored as `fault`, and suppressed."""

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self.fault = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, raised: BaseException | None, _: TracebackType | None) -> bool:
        if not isinstance(raised, Exception):  # Ctrl-C and the end of a generator are not an engine's fault
            return False
        self.fault = f"it failed: {type(raised).__name__}: {raised}".rstrip(": ")[:MAX_QUOTED]
        event(_log, logging.WARNING, "engine.failed", engine=self._engine, fault=self.fault)
        return True
