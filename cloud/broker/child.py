"""mosquitto as a child process: the own broker of a cloud, or of a region, if mosquitto is installed.

Its configuration is that of `edgefl cloud broker-config`, in a folder of the owner's home; it runs as the owner's
user. It is stopped with its owner, even if that is killed, and restarted if it exits by itself.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pwd
import re
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Protocol, Self

from cloud.broker.mosquitto_config import CONFIG_FILE, CRL_FILE, MAX_CONNECTIONS, broker_config, write_broker_config
from edgefl.errors import ConfigError
from edgefl.logs import event
from edgefl.process.guardian import gated, guardian, open_gate
from edgefl.process.home import replace_file
from edgefl.protocols.backoff import Backoff
from edgefl.protocols.ports.listener import listen
from edgefl.protocols.tls import CLOUD_NAME

EMBEDDED, BUILTIN = "embedded", "builtin"  # --broker: mosquitto if it is installed, or never
OLDEST = (2, 0)  # the first with "TLS 1.3 only" and client ids from certificates
START_S, STOP_S = 10.0, 5.0
FIRST_DELAY_S, LAST_DELAY_S = 0.2, 5.0  # before a restart; doubles
KEPT_DESCRIPTORS = 64  # descriptors for its files and log

_log = logging.getLogger(__name__)


def find_mosquitto() -> str | None:
    """Return the path of a supported mosquitto, on the PATH or in Debian's folder; None if there is none."""
    program = shutil.which("mosquitto", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
    if program is None:
        return None
    output = subprocess.run([program, "-h"], capture_output=True, text=True, timeout=START_S, check=False).stdout
    version = re.search(r"version (\d+)\.(\d+)", output)
    if version is None or tuple(map(int, version.groups())) < OLDEST:
        event(_log, logging.WARNING, "broker.mosquitto_too_old", program=program, said=output[:60])
        return None
    return program


class Control(Protocol):
    """Updates the files of a mosquitto, and makes it use them. Called in threads."""

    def drop(self, device: str) -> None:
        """End the connection of a removed device."""

    def refresh(self) -> None:
        """Update the files if necessary."""


class MosquittoChild:
    """Runs mosquitto within the context. `reason` says why it is not serving, and is empty while it is.

    `folder` has ca.pem, cert.pem, key.pem and crl.pem; `control` updates the mosquitto there. Do not call `drop` and
    `refresh` in the event loop.
    """

    program = "mosquitto"

    def __init__(
        self, program: str, folder: Path, host: str, port: int, control: Control, *, owner: str = CLOUD_NAME
    ) -> None:
        self.drop, self.refresh, self._owner = control.drop, control.refresh, owner
        self._command = [program, "-c", str(folder / CONFIG_FILE)]
        self._folder, self._host, self._port = folder, host, port
        self.reason = "mosquitto has not started yet"
        self._running = asyncio.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._last_line = ""  # of its log
        self._backoff = Backoff(FIRST_DELAY_S, LAST_DELAY_S)

    async def __aenter__(self) -> Self:
        """Start it and wait until it serves; raises ConfigError if it does not start, or the port is in use."""
        self._loop = asyncio.get_running_loop()
        listen(self._host, self._port, "--mqtt-port").close()
        self._write_config()
        self._task = asyncio.create_task(self._restart(), name="mosquitto")
        waiting = asyncio.create_task(self._running.wait(), name="mosquitto-start")
        await asyncio.wait({waiting, self._task}, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not self._running.is_set():
            await self.__aexit__()
            raise ConfigError(f"{self.reason}; use `--broker builtin` to do without it")
        return self

    def restart(self) -> None:
        """End it with all connections; it starts again at once. May be called from any thread."""
        self._loop.call_soon_threadsafe(self._end_process)

    def _end_process(self) -> None:
        self._write_config()
        if self._process is not None:
            self._process.terminate()

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})
        await asyncio.to_thread(self._stop)

    def _write_config(self) -> None:
        write_broker_config(self._folder, self._host, self._port, self._owner)
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = min(MAX_CONNECTIONS, limit - KEPT_DESCRIPTORS)
        config = broker_config(self._folder, self._host, self._port)
        config = config.replace("log_type notice\n", "")  # it logs one line per connection
        config = config.replace(f"max_connections {MAX_CONNECTIONS}\n", f"max_connections {most}\n")
        if not (self._folder / CRL_FILE).exists():  # of a region that was not told yet who is revoked
            config = config.replace(f"crlfile {self._folder / CRL_FILE}\n", "")
        config += f"user {pwd.getpwuid(os.geteuid()).pw_name}\n"
        replace_file(self._folder / CONFIG_FILE, config.encode())

    async def _restart(self) -> None:
        """Run it, and restart it when it exits."""
        while True:
            try:
                await self._run()
            except OSError as fault:  # temporary: too many processes or descriptors
                self._last_line = str(fault)
            status = await asyncio.to_thread(self._stop)
            self.reason = f"mosquitto has exited with status {status}; its last log line: {self._last_line or 'none'}"
            if not self._running.is_set():
                return  # it never served: `__aenter__` raises
            event(_log, logging.ERROR, "broker.ended", status=status, said=self._last_line)
            await asyncio.sleep(self._backoff.next_s())

    async def _run(self) -> None:
        """Start it, and copy its log to ours until it exits."""
        self._last_line = ""
        self._process = process = subprocess.Popen(  # noqa: ASYNC220 - asyncio's own needs a thread to wait for it
            gated(self._command), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            start_new_session=True,  # so that Ctrl-C reaches the cloud only, which stops mosquitto last
        )  # fmt: skip
        open_gate(process)
        log = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(log), process.stderr
        )
        try:
            async for line in log:
                self._last_line = line.decode(errors="replace").strip().partition(": ")[2]
                if self._last_line.endswith(" running"):
                    self.reason = ""
                    self._backoff.reset()
                    self._running.set()
                event(_log, logging.INFO, "broker.said", mosquitto=self._last_line)
        finally:
            transport.close()

    def _stop(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_S)
        guardian.release(process.pid)
        return process.returncode
