"""The packages that a task needs and this device lacks: refused with the reason or, if it is allowed, installed.

An environment is a venv in `HOME/environments/<hash of the requirements>`, which sees the agent's own packages: pip
installs into it only what is missing, and never another version of what edgefl itself needs (numpy, torch, ...). Only
the trainer process uses it. pip and not uv, because uv does not take packages outside of a venv for installed. An
index of the operator's is set as for pip everywhere: PIP_INDEX_URL, PIP_FIND_LINKS, PIP_NO_INDEX.
Invariant: an environment without the file DONE is not used; one install at a time, bounded in time and owned by `run`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path

from edge_agent.disk import require_space
from edgefl.errors import EdgeflError, TaskError
from edgefl.logs import event
from edgefl.process.requirements import needs, own_closure, requirement_in, requirements_of, unmet
from edgefl.terminal.text import one_line

INSTALL_S = 900.0  # for one environment
RETRY_S = 60.0  # after a failure
SPACE_BYTES = 300 << 20  # what must be free before anything is installed
MAX_KEPT = 4  # environments
DONE = "DONE"
_MAX_PYPROJECT_BYTES = 1 << 20
_MAX_OUTPUT_BYTES = 1 << 20
_MAX_REASON_CHARS = 400
_NICENESS = 10
_EXTRAS = ("agent", "train")  # what the trainer uses of edgefl
_OFFLINE = re.compile(
    r"NewConnectionError|Name or service not known|Temporary failure in name resolution|Network is unreachable|"
    r"ConnectTimeoutError|Connection refused|ProxyError|No route to host"
)
_ERROR = re.compile(r"^\s*(?:ERROR|error): *(.+)$", re.MULTILINE)
_CONFLICT = re.compile(r"The conflict is caused by:\n((?: {4}.+\n)+)")

_log = logging.getLogger(__name__)


class Environments:
    """The environments of one agent. Used from its event loop."""

    def __init__(self, home: Path, *, may_install: bool = False, install_s: float = INSTALL_S) -> None:
        self._folder = home / "environments"
        self._may_install, self._install_s = may_install, install_s
        self._requirements: dict[str, tuple[str, ...]] = {}  # by the bundle's digest
        self._waiting: asyncio.Queue[tuple[str, tuple[str, ...]]] = asyncio.Queue()
        self._results: dict[str, asyncio.Future[Path]] = {}  # of what is being installed, by hash
        self._failed: dict[str, tuple[str, float]] = {}  # by hash: why, and when
        for half in self._folder.glob(".*") if self._folder.exists() else ():
            shutil.rmtree(half, ignore_errors=True)

    async def run(self) -> None:
        """Install what is asked for, one environment after another; runs until cancelled."""
        while True:
            name, requirements = await self._waiting.get()
            result = self._results[name]
            try:
                folder = await self._install(name, requirements)
            except (EdgeflError, OSError) as error:
                reason = str(error)
                event(_log, logging.WARNING, "environment.failed", requirements=" ".join(requirements), reason=reason)
                self._failed[name] = reason, time.monotonic()
                result.set_exception(TaskError(reason))
                result.exception()  # retrieved, also if nobody waits any more
            except BaseException as error:  # a bug, or the agent ends: nobody may wait for ever
                result.set_exception(TaskError(f"the install was cut short: {error!r}"))
                result.exception()
                raise
            else:
                result.set_result(folder)
            finally:
                del self._results[name]

    async def get(self, archive: Path) -> str:
        """Return the folder of packages that a bundle's task needs beside the agent's own; empty if it needs none.

        Raises TaskError if this device lacks something, or if it cannot be installed. To be cancelled does not stop an
        install: a later round finds it.
        """
        requirements = self._read(archive)
        missing = await asyncio.to_thread(unmet, requirements)
        if not missing:
            return ""
        if not self._may_install:
            raise TaskError(f"{needs(missing)}. Install it there, or start the agent with --install-dependencies")
        name = hashlib.sha256("\n".join([sys.version, *sorted(requirements)]).encode()).hexdigest()[:32]
        folder = self._folder / name
        if (folder / DONE).exists():
            os.utime(folder)
            return str(_packages(folder))
        reason, failed_s = self._failed.get(name, ("", 0.0))
        if reason and time.monotonic() - failed_s < RETRY_S:
            raise TaskError(reason)
        if name not in self._results:
            self._results[name] = asyncio.get_running_loop().create_future()
            self._waiting.put_nowait((name, (*_foreign(requirements), *map(requirement_in, missing))))
        return str(_packages(await asyncio.shield(self._results[name])))

    def _read(self, archive: Path) -> tuple[str, ...]:
        if archive.stem not in self._requirements:
            try:
                with zipfile.ZipFile(archive) as bundle, bundle.open("pyproject.toml") as file:
                    text = file.read(_MAX_PYPROJECT_BYTES).decode()
            except (KeyError, zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError, RuntimeError):
                text = ""  # a module without a folder; or no bundle, which the trainer refuses when it unpacks it
            is_task = "[tool.flwr" not in text  # Flower's apps name what their simulation needs, too
            found = requirements_of(text, "the task's pyproject.toml") if is_task else ()
            self._requirements = dict([*self._requirements.items(), (archive.stem, found)][-64:])
        return self._requirements[archive.stem]

    async def _install(self, name: str, requirements: Sequence[str]) -> Path:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._forget_oldest()
        require_space(self._folder, SPACE_BYTES, f"an environment with {' '.join(requirements)}")
        half, folder = self._folder / f".{name}", self._folder / name
        shutil.rmtree(half, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        event(_log, logging.INFO, "environment.begun", requirements=" ".join(requirements))
        start_s = time.monotonic()
        try:
            async with asyncio.timeout(self._install_s):
                await self._make(half, requirements)
        except BaseException as cause:
            shutil.rmtree(half, ignore_errors=True)
            if not isinstance(cause, TimeoutError):
                raise
            raise TaskError(
                f"installing {' '.join(requirements)} took longer than {self._install_s:g} s; install it on the device"
            ) from cause
        half.rename(folder)
        (folder / DONE).write_text("\n".join(requirements), encoding="utf-8")
        event(_log, logging.INFO, "environment.made", requirements=" ".join(requirements),
              seconds=time.monotonic() - start_s)  # fmt: skip
        return folder

    async def _make(self, half: Path, requirements: Sequence[str]) -> None:
        # Not importlib.util.find_spec: where setuptools has its hook, it would take distutils out of this process.
        has_pip = PathFinder.find_spec("pip") is not None
        if not has_pip and PathFinder.find_spec("ensurepip") is None:
            raise TaskError(
                f"{sys.executable} has neither pip nor ensurepip, so nothing can be installed; install "
                f"{' '.join(requirements)} on the device, or pip (on Debian: apt-get install python3-pip python3-venv)"
            )
        await _run([sys.executable, "-m", "venv", *(["--without-pip"] if has_pip else []), str(half)], "making a venv")
        ours = [entry for entry in sys.path if Path(entry).name in {"site-packages", "dist-packages"}]
        (_packages(half) / "agent.pth").write_text("\n".join(ours), encoding="utf-8")
        pins = await asyncio.to_thread(own_closure, _EXTRAS)
        (half / "constraints.txt").write_text(
            "\n".join(f"{name}=={version}" for name, version in sorted(pins.items())), encoding="utf-8"
        )
        await _run(
            [
                str(half / "bin" / "python"), "-m", "pip", "install", "--no-input", "--disable-pip-version-check",
                "--no-cache-dir", "--prefer-binary", "--retries", "1", "--timeout", "20", "--progress-bar", "off",
                "--constraint", str(half / "constraints.txt"), *requirements,
            ],
            f"installing {' '.join(requirements)}",
        )  # fmt: skip
        (_packages(half) / "agent.pth").unlink()

    def _forget_oldest(self) -> None:
        made = sorted(
            (one for one in self._folder.iterdir() if (one / DONE).exists()), key=lambda one: one.stat().st_mtime
        )
        for oldest in made[: -(MAX_KEPT - 1)]:
            shutil.rmtree(oldest, ignore_errors=True)


async def _run(command: Sequence[str], doing: str) -> None:
    """Run a command to its end; raises TaskError with its reason in one line. Cancelled, it is killed."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        start_new_session=True, env=_environment(),
    )  # fmt: skip
    try:
        with suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, process.pid, _NICENESS)
        output = await _last_of(process)
        status = await process.wait()
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        raise
    if status != 0:
        raise TaskError(f"{doing} failed: {reason_in(output) or f'exit status {status}'}")


async def _last_of(process: asyncio.subprocess.Process) -> str:
    output = b""
    while process.stdout is not None and (part := await process.stdout.read(1 << 16)):
        output = (output + part)[-_MAX_OUTPUT_BYTES:]
    return output.decode(errors="replace")


def reason_in(output: str) -> str:
    """Return pip's reason for a failure in one line; empty if it gave none."""
    errors = [one.strip() for one in _ERROR.findall(output)]
    conflict = _CONFLICT.search(output)
    if conflict is not None:
        errors = [*errors[:1], ", ".join(line.strip() for line in conflict[1].splitlines())]
    elif _OFFLINE.search(output):
        errors = ["no network: the package index cannot be reached"]
    return one_line("; ".join(dict.fromkeys(errors)) or output.strip()[-_MAX_REASON_CHARS:], _MAX_REASON_CHARS)


def _environment() -> Mapping[str, str]:
    """Return the environment variables for pip: the agent's, without those that change where Python finds modules."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_USER", "PIP_REQUIRE_VIRTUALENV"}
    return {name: value for name, value in os.environ.items() if name not in hidden}


def _foreign(requirements: Sequence[str]) -> tuple[str, ...]:
    """Return the requirements of other packages than edgefl itself, which is what runs here."""
    return tuple(one for one in requirements if not re.match(r"(?i)edgefl(?:[-_.]fleet)?(?![\w.-])", one.strip()))


def _packages(environment: Path) -> Path:
    return environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
