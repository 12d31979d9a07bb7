"""Fixtures for what only shows from the outside: files, processes, and what happens in another thread or task."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

WAIT_S = 30.0


@pytest.fixture
def eventually() -> Callable[..., None]:
    """Wait for what only shows from the outside (a file, a process)."""

    def wait(condition: Callable[[], object], what: str = "it") -> None:
        end_s = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < end_s, f"{what} did not happen"
            time.sleep(0.02)

    return wait


@pytest.fixture
def until() -> Callable[..., Awaitable[None]]:
    """`eventually` for coroutines: what is waited for happens in another process, thread or task."""

    async def wait(condition: Callable[[], object]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110 - a test looks from the outside; there is no event
                await asyncio.sleep(0.005)

    return wait


@pytest.fixture
def children_of() -> Callable[[int], list[int]]:
    """Return the process ids of a process's children."""

    def children(pid: int) -> list[int]:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    return children


@pytest.fixture
def alive() -> Callable[[int], bool]:
    def is_alive(pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"

    return is_alive
