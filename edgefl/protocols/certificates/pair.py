"""Replaces a key and its certificate together, atomically.

Enrolment writes `key.pem` and `cert.pem` as files. The first renewal replaces them with symbolic links through
`pair`, itself a link to the folder of the current pair. So a reader sees either the old pair or the new one, also
after a crash at any moment.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from edgefl.process.durable import flush
from edgefl.protocols.tls import Identity, serial_number, write_private

LINK = "pair"
NAMES = ("key.pem", "cert.pem")


def replace_pair(home: Path, key_pem: bytes, cert_pem: bytes) -> None:
    """Replace a home's key and certificate, and delete the old ones."""
    _become_links(home)
    _point(home / LINK, _written(home, key_pem, cert_pem))
    flush(home)
    in_use = (home / LINK).readlink().name
    for folder in home.glob("pair-*"):
        if folder.name != in_use:
            shutil.rmtree(folder)


def _become_links(home: Path) -> None:
    """Turn a home's key and certificate files into links with the same contents."""
    identity = Identity.in_folder(home)
    if identity.key.is_symlink() and identity.cert.is_symlink():
        return
    _point(home / LINK, _written(home, identity.key.read_bytes(), identity.cert.read_bytes()))
    for name in NAMES:
        _point(home / name, f"{LINK}/{name}")


def _written(home: Path, key_pem: bytes, cert_pem: bytes) -> str:
    """Write a pair into a new folder, synced to disk; return the folder's name."""
    folder = home / f"pair-{serial_number(cert_pem)}"
    with contextlib.suppress(FileNotFoundError):  # left by an interrupted attempt
        shutil.rmtree(folder)
    folder.mkdir(mode=0o700)
    for name, data in zip(NAMES, (key_pem, cert_pem), strict=True):
        write_private(folder / name, data)
        flush(folder / name)
    flush(folder)
    return folder.name


def _point(link: Path, target: str) -> None:
    """Atomically replace a file or link with a link to `target`."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
