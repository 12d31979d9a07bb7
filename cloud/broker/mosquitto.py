"""Controls a configured mosquitto: its list of revoked certificates, its own certificate, and removed devices.

mosquitto cannot ask the cloud whether a device is still enrolled. It uses a list of revoked certificates (CRL) in
the folder that `edgefl cloud broker-config` made, and reloads list and certificate on SIGHUP (tested with 2.0.11).
Open connections stay open: so the cloud takes over the connection of a removed device, with a temporary certificate
of the same name.
A mosquitto on another machine downloads the list over HTTPS (/v1/crl), and is restarted by its own timer.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from cryptography import x509

from cloud.broker.mosquitto_config import CONFIG_FILE, CRL_FILE, PID_FILE
from cloud.trust.crl import make_crl
from cloud.trust.own_certificates import hosts_of, renew_server
from edgefl.errors import ConfigError
from edgefl.logs import event
from edgefl.process.home import replace_file
from edgefl.protocols.mqtt import LinkConfig, MqttError, new_client
from edgefl.protocols.tls import BROKER_NAME, Identity, client_context, new_request, sign_request

TAKE_OVER_DAYS = 1.0  # lifetime of the certificate that takes over a connection

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class MosquittoSettings:
    """Where mosquitto is, and the data for its files."""

    url: str  # mqtts://host:port
    folder: Path  # made by broker-config; it may be missing
    ca_folder: Path
    revoked: Callable[[], Sequence[str]]  # serial numbers in hex, in order; entries are never removed
    certificate_days: float
    pid_file: Path | None = None  # None = in the folder
    removed: Sequence[str] = ()  # devices whose connections may still be open


class Mosquitto:
    """Controls one mosquitto. Methods block for seconds at most; do not call them in an event loop."""

    def __init__(self, settings: MosquittoSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()  # one writer of the folder at a time
        self._uncut = set(settings.removed)
        self._num_listed = -1  # entries in the written CRL
        self._hangup = Hangup(settings.pid_file or settings.folder / PID_FILE)
        self._signalled = True  # whether mosquitto got a signal after the last change

    def refresh(self) -> None:
        """Update the CRL and the certificate if necessary, make mosquitto reload them, and retry open take-overs."""
        self._update(even_unchanged=False)
        for device in sorted(self._uncut):
            if not self._take_over(device):
                break  # no connection to the broker

    def begin(self) -> None:
        """Write the CRL at the cloud's start, even if unchanged, because it expires with the CA.

        Logs a warning if an older edgefl configured mosquitto without a CRL.
        """
        self._update(even_unchanged=True)
        config = _content(self._settings.folder / CONFIG_FILE)
        if config and b"\ncrlfile " not in config:
            advice = "mosquitto accepts revoked certificates: run `edgefl cloud broker-config` again, and restart it"
            event(_log, logging.WARNING, "broker.config_old", file=self._settings.folder / CONFIG_FILE, advice=advice)

    def drop(self, device: str) -> None:
        """End the connection of a removed device, whose certificate is revoked.

        If we cannot signal mosquitto, the device may reconnect before the CRL is reloaded: `refresh` ends it again.
        """
        self._update(even_unchanged=False)
        self._take_over(device)
        if not self._signalled:
            self._uncut.add(device)

    def _update(self, *, even_unchanged: bool) -> None:
        with self._lock:
            if self._settings.folder.is_dir() and (
                self._write(even_unchanged=even_unchanged) or self._hangup.is_starting
            ):
                self._signalled = self._hangup.send()

    def _write(self, *, even_unchanged: bool) -> bool:
        folder, ca = self._settings.folder, self._settings.ca_folder / "ca.pem"
        changed = False
        if _content(folder / "ca.pem") != ca.read_bytes():
            replace_file(folder / "ca.pem", ca.read_bytes())
            changed = even_unchanged = True
        serials = self._settings.revoked()
        if even_unchanged or len(serials) != self._num_listed:
            replace_file(folder / CRL_FILE, make_crl(self._settings.ca_folder, serials))
            self._num_listed = len(serials)
            changed = True
        return self._renew() or changed

    def _renew(self) -> bool:
        """Renew the broker's certificate for its present hosts, if necessary; returns whether it was renewed."""
        identity = Identity.in_folder(self._settings.folder)
        try:
            hosts = hosts_of(x509.load_pem_x509_certificate(identity.cert.read_bytes()))
        except (OSError, ValueError) as fault:
            event(_log, logging.ERROR, "broker.no_certificate", file=identity.cert, reason=fault,
                  advice="run `edgefl cloud broker-config` again, and restart mosquitto")  # fmt: skip
            return False
        renewed = renew_server(self._settings.ca_folder, identity, hosts, BROKER_NAME, self._settings.certificate_days)
        if renewed:
            event(_log, logging.INFO, "broker.certificate_renewed", file=identity.cert)
        return renewed

    def _take_over(self, device: str) -> bool:
        """Connect as this device, so that the broker ends its other connection, and disconnect."""
        ca = self._settings.ca_folder
        try:
            with tempfile.TemporaryDirectory(prefix=".take-over-", dir=ca) as folder:
                identity = Identity(Path(folder, "key.pem"), Path(folder, "cert.pem"), ca / "ca.pem")
                identity.cert.write_bytes(sign_request(ca, new_request(identity, device), device, TAKE_OVER_DAYS))
                asyncio.run(_connect_once(LinkConfig(url=self._settings.url, client_id=device, identity=identity)))
        except (OSError, ConfigError, MqttError) as fault:
            self._uncut.add(device)  # `refresh` tries again
            event(_log, logging.WARNING, "broker.not_dropped", device=device, reason=fault)
            return False
        self._uncut.discard(device)
        event(_log, logging.INFO, "broker.dropped", device=device)
        return True


class Hangup:
    """Sends SIGHUP to a mosquitto, by its pid file, so that it reloads its files."""

    def __init__(self, pid_file: Path) -> None:
        self._path = pid_file
        self.is_starting = False  # at the last attempt: send the signal later

    def send(self) -> bool:
        """Return whether mosquitto has got the signal; otherwise the log says why not."""
        try:
            pid = int(self._path.read_text(encoding="ascii"))
            if psutil.Process(pid).name() != "mosquitto":
                raise ProcessLookupError(f"process {pid} is not mosquitto")
            self.is_starting = not catches_hangup(pid)
            if self.is_starting:
                return False
            os.kill(pid, signal.SIGHUP)
        except (OSError, ValueError, psutil.Error) as fault:
            advice = "send SIGHUP to mosquitto if it is on this machine; for another machine see mosquitto.conf"
            event(_log, logging.WARNING, "broker.not_reloaded", pid_file=self._path, reason=fault, advice=advice)
            return False
        event(_log, logging.INFO, "broker.reloaded", pid=pid)
        return True


async def _connect_once(config: LinkConfig) -> None:
    """Connect, and disconnect."""
    tls = client_context(config.identity.ca, config.identity) if config.identity else None
    async with new_client(config, tls):
        pass


def catches_hangup(pid: int) -> bool:
    """Whether a process handles SIGHUP, which would kill it otherwise; mosquitto does so shortly after its start."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (signal.SIGHUP - 1) & 1)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
