"""Child processes that run a Python module: start them, notice when they end, and end them with their parent.

The child calls `die_with_parent` first of all, and `limit_own_memory` before it loads anything large.
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
from collections.abc import Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # prctl(2)
_STDERR = 2
_REAP_S = 5.0
# OpenBLAS's threads wait actively for more work, for 2^26 cycles by default. Between two tokens that takes the cores
# from the other processes here; 2^20 cycles (0.3 ms) bridge the time between two products of one token.
SHORT_WAITS = {"OPENBLAS_THREAD_TIMEOUT": "20"}
OOM_SCORE = 500  # of 1000: the kernel kills this process before its parent


class Child:
    """A Python module that runs in a separate process. Create it in the event loop's thread."""

    def __init__(
        self,
        module: str,
        *arguments: str,
        descriptors: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`environment` replaces variables of this process's own."""
        self._process = subprocess.Popen(
            # -P: do not import modules from the current folder
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=_STDERR,
            pass_fds=tuple(descriptors),
            env=None if environment is None else {**os.environ, **environment},
            start_new_session=True,  # Ctrl-C goes to the parent only, which stops its children in order
        )
        self.pid = self._process.pid
        self.ended = asyncio.Event()
        self._pidfd = os.pidfd_open(self.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._on_end)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if the process still runs."""
        if not self.ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def kill(self) -> None:
        """Kill the process and wait until it has ended."""
        self.signal(signal.SIGKILL)
        await self.ended.wait()

    async def stop(self, within_s: float) -> None:
        """Send SIGTERM, and SIGKILL if the process has not ended within `within_s` seconds."""
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(within_s):
                await self.ended.wait()
        finally:
            self.signal(signal.SIGKILL)

    @property
    def end(self) -> str:
        """How the process ended, for messages."""
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
    """Let the kernel kill this process when its parent ends, for whatever reason."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)  # the parent ended before prctl


def limit_own_memory(limit_mb: int) -> None:
    """Limit this process's data size (0 = no limit), and let the kernel's OOM killer prefer it to the parent."""
    with contextlib.suppress(OSError):  # a container may forbid it
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE), encoding="ascii")
    if limit_mb:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = limit_mb << 20
        resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard < 0 else min(wanted, hard), hard))
