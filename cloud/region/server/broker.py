"""The broker of a region: mosquitto as its child if installed, or the built-in one, as for a cloud.

A region has no key of the CA. So its mosquitto uses the region's own certificate, and the list of revoked ones that its
parent sends. It cannot take over the connection of a removed device, as a cloud does: it restarts mosquitto instead,
and the other devices reconnect within seconds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from pathlib import Path

from cloud.broker.mosquitto import Hangup
from cloud.broker.mosquitto_config import CRL_FILE, PID_FILE
from edgefl.process.home import replace_file
from edgefl.protocols.tls import Identity


class RegionMosquitto:
    """Keeps the files of a region's mosquitto up to date. Methods block shortly; call them in threads."""

    def __init__(
        self, folder: Path, identity: Identity, crl: Callable[[], bytes], members: Callable[[], Collection[str]]
    ) -> None:
        self._folder, self._identity, self._crl, self._members = folder, identity, crl, members
        self._lock = threading.Lock()  # one writer of the folder at a time
        self._hangup = Hangup(folder / PID_FILE)
        self.restart: Callable[[], None] = lambda: None  # of the child, once there is one
        folder.mkdir(mode=0o700, exist_ok=True)
        self._write()

    def refresh(self) -> None:
        """Update the files if necessary, and make mosquitto reload them."""
        with self._lock:
            had_list = (self._folder / CRL_FILE).exists()
            changed = self._write()
            if not had_list and (self._folder / CRL_FILE).exists():
                self.restart()  # it was configured without a list
            elif changed or self._hangup.is_starting:
                self._hangup.send()

    def drop(self, device: str) -> None:
        """End all connections if a device was removed; one that was assigned elsewhere leaves by itself."""
        self.refresh()
        if device not in self._members():
            self.restart()

    def _write(self) -> bool:
        """Write the files that have changed; return whether any had."""
        own, here = self._identity, Identity.in_folder(self._folder)
        wanted = {here.ca: own.ca.read_bytes(), here.key: own.key.read_bytes(), here.cert: own.cert.read_bytes(),
                  self._folder / CRL_FILE: self._crl()}  # fmt: skip
        changed = {
            path: data for path, data in wanted.items() if data and (not path.exists() or path.read_bytes() != data)
        }
        for path, data in changed.items():
            replace_file(path, data)
        here.key.chmod(0o600)
        return bool(changed)
