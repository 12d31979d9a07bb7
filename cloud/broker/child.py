"""A mosquitto as the cloud's child: the cloud's own broker, where the machine has one.

It is configured as `edgefl cloud broker-config` configures a mosquitto of one's own, in a folder of the cloud's home,
and runs as the cloud's user. It ends with the cloud, whatever ends that; where it ends by itself it is started again.
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
from typing import Self

from cloud.broker.mosquitto import Mosquitto
from cloud.broker.mosquitto_config import CONFIG_FILE, MAX_CONNECTIONS, broker_config, write_broker_config
from edgefl.errors import ConfigError
from edgefl.logs import event
from edgefl.process.guardian import gated, guardian, open_gate
from edgefl.process.home import replace_file
from edgefl.protocols.backoff import Backoff
from edgefl.protocols.ports.listener import listen

OLDEST = (2, 0)  # TLS 1.3 alone, and a client id that follows the certificate
START_S, STOP_S = 10.0, 5.0
FIRST_DELAY_S, LAST_DELAY_S = 0.2, 5.0  # before it is started again; doubles
KEPT_DESCRIPTORS = 64  # for its files and log

_log = logging.getLogger(__name__)


def find_mosquitto() -> str | None:
    """Return the path of a mosquitto that we can configure, on the PATH or where Debian puts it."""
    program = shutil.which("mosquitto", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
    if program is None:
        return None
    said = subprocess.run([program, "-h"], capture_output=True, text=True, timeout=START_S, check=False).stdout
    version = re.search(r"version (\d+)\.(\d+)", said)
    if version is None or tuple(map(int, version.groups())) < OLDEST:
        event(_log, logging.WARNING, "broker.mosquitto_too_old", program=program, said=said[:60])
        return None
    return program


class MosquittoChild:
    """Runs mosquitto while the context lasts; `reason` says why it does not serve, and is empty while it does.

    `folder` holds ca.pem, cert.pem, key.pem and crl.pem; `hold` is ours on the mosquitto there. `drop` and `refresh`
    are called from other threads than the event loop's.
    """

    program = "mosquitto"

    def __init__(self, program: str, folder: Path, host: str, port: int, hold: Mosquitto) -> None:
        self.drop, self.refresh = hold.drop, hold.refresh
        self._command = [program, "-c", str(folder / CONFIG_FILE)]
        self._folder, self._host, self._port = folder, host, port
        self.reason = "mosquitto has not started yet"
        self._running = asyncio.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._said = ""  # the last line of its log
        self._backoff = Backoff(FIRST_DELAY_S, LAST_DELAY_S)

    async def __aenter__(self) -> Self:
        """Return when it serves; raises ConfigError where it does not start, or the port is in use."""
        listen(self._host, self._port, "--mqtt-port").close()
        self._write_config()
        self._task = asyncio.create_task(self._keep(), name="mosquitto")
        waiting = asyncio.create_task(self._running.wait(), name="mosquitto-start")
        await asyncio.wait({waiting, self._task}, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not self._running.is_set():
            await self.__aexit__()
            raise ConfigError(f"{self.reason}; `--broker builtin` does without it")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})
        await asyncio.to_thread(self._end)

    def _write_config(self) -> None:
        write_broker_config(self._folder, self._host, self._port)
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = min(MAX_CONNECTIONS, limit - KEPT_DESCRIPTORS)
        config = broker_config(self._folder, self._host, self._port)
        config = config.replace("log_type notice\n", "")  # a line for each connection
        config = config.replace(f"max_connections {MAX_CONNECTIONS}\n", f"max_connections {most}\n")
        config += f"user {pwd.getpwuid(os.geteuid()).pw_name}\n"
        replace_file(self._folder / CONFIG_FILE, config.encode())

    async def _keep(self) -> None:
        """Run it, again and again."""
        while True:
            try:
                await self._run()
            except OSError as fault:  # no process, no descriptor: it passes
                self._said = str(fault)
            status = await asyncio.to_thread(self._end)
            self.reason = f"mosquitto has ended with status {status}, its last words: {self._said or 'none'}"
            if not self._running.is_set():
                return  # it never served: its owner is told
            event(_log, logging.ERROR, "broker.ended", status=status, said=self._said)
            await asyncio.sleep(self._backoff.next_s())

    async def _run(self) -> None:
        """Start it and pass on what it logs, until it has ended."""
        self._said = ""
        self._process = process = subprocess.Popen(  # noqa: ASYNC220 - asyncio's own has a thread wait for it
            gated(self._command), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal is for the cloud, which ends it last
        )  # fmt: skip
        open_gate(process)
        log = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(log), process.stderr
        )
        try:
            async for line in log:
                self._said = line.decode(errors="replace").strip().partition(": ")[2]
                if self._said.endswith(" running"):
                    self.reason = ""
                    self._backoff.reset()
                    self._running.set()
                event(_log, logging.INFO, "broker.said", mosquitto=self._said)
        finally:
            transport.close()

    def _end(self) -> int | None:
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
