"""Child processes of the agent: started, heard of when they end, and gone when the agent is.

The child's half is `die_with_parent` and `take_the_blame_for_memory`; both are for its first lines.
Invariant: `Child.ended` is set once, after the process is reaped, whatever ended it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # prctl(2)
_STDERR = 2
_REAP_S = 5.0
OOM_SCORE = 500  # of 1000: the kernel takes this process before the agent


class Child:
    """A Python module that runs as a process of its own. Made in the event loop's thread."""

    def __init__(self, module: str, *arguments: str, descriptors: Sequence[int] = ()) -> None:
        self._process = subprocess.Popen(
            # -P: no file in the folder we were started from is taken for a module of ours
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=_STDERR,
            pass_fds=tuple(descriptors),
            start_new_session=True,  # Ctrl-C is for the agent, which ends its children in order
        )
        self.pid = self._process.pid
        self.ended = asyncio.Event()
        self._pidfd = os.pidfd_open(self.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._on_end)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if the process is still there."""
        if not self.ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def kill(self) -> None:
        """End it at once; returns when it is gone."""
        self.signal(signal.SIGKILL)
        await self.ended.wait()

    async def stop(self, within_s: float) -> None:
        """Ask it to end, and kill it where it does not in time."""
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(within_s):
                await self.ended.wait()
        finally:
            self.signal(signal.SIGKILL)

    @property
    def end(self) -> str:
        """How it ended, in words."""
        code = self._process.returncode
        if code is None:
            return "runs"
        if code >= 0:
            return f"ended with exit status {code}"
        hint = " (the system may have run out of memory)" if -code == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-code).name}{hint}"

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._process.wait(_REAP_S)
        self.ended.set()


def die_with_parent() -> None:
    """Have the kernel kill this process with its parent, whatever ends that one."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)  # it went before we asked


def take_the_blame_for_memory(limit_mb: int) -> None:
    """Bound this process's data (0 = not), and have the kernel end it before the agent where the machine's runs out."""
    with contextlib.suppress(OSError):  # a container may forbid it
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE), encoding="ascii")
    if limit_mb:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = limit_mb << 20
        resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard < 0 else min(wanted, hard), hard))
