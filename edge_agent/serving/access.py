"""Who may request predictions: any client on this machine; others need a token or a certificate of the fleet.

With mutual TLS the device shows its own certificate, which names it `NAME.device.edgefl.internal`, and
clients show one of the same CA that is not on the fleet's list of revoked ones (`edge_agent/serving/revoked.py`).
A renewed certificate and a new list count from the next connection on.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgefl.errors import ConfigError
from edgefl.protocols.addresses import is_loopback

if TYPE_CHECKING:
    from edgefl.protocols import tls

REVOKED_FILE = "revoked.pem"  # in a home: the list of revoked certificates (CRL), once there is one
MIN_TOKEN_CHARS = 16
_TOKEN = re.compile(rb"[A-Za-z0-9._~+/=-]+")  # RFC 6750


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """How the serving port is guarded; raises ConfigError where it would be open to a network."""

    host: str
    token_file: Path | None = None
    mutual_tls: bool = False

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and self.token_file is None and not self.mutual_tls:
            raise ConfigError(
                f"--serve-host {self.host} opens predictions to the network, and nothing would guard them. Add "
                "--serve-tls (clients then need a certificate of this fleet), or --serve-token-file FILE (clients "
                "then send what the file holds as a bearer token; put TLS in front), or serve on 127.0.0.1"
            )
        self.token()

    def token(self) -> str:
        """Return the token that clients have to send; empty = none is asked for. Raises ConfigError."""
        if self.token_file is None:
            return ""
        try:
            text = self.token_file.read_bytes().strip()
        except OSError as cause:
            raise ConfigError(f"--serve-token-file {self.token_file} cannot be read: {cause.strerror}") from cause
        if len(text) < MIN_TOKEN_CHARS or _TOKEN.fullmatch(text) is None:
            raise ConfigError(
                f"--serve-token-file {self.token_file} must hold one token of at least {MIN_TOKEN_CHARS} letters, "
                "digits or ._~+/=-; `openssl rand -hex 32` makes one"
            )
        return text.decode()


def server_contexts(home: Path) -> Callable[[], ssl.SSLContext]:
    """Return what gives mutual TLS for a connection, by a home's certificate and list of revoked ones as they are then.

    It raises OSError while one of the files cannot be read: all clients are refused then.
    """
    from edgefl.protocols import tls

    identity, revoked = tls.Identity.in_folder(home), home / REVOKED_FILE

    def stamps() -> tuple[object, ...]:
        return _stamp(identity.cert), _stamp(identity.ca), _stamp(revoked)

    latest = (stamps(), _server_context(identity, revoked))

    def current() -> ssl.SSLContext:
        nonlocal latest
        now = stamps()
        if now != latest[0]:
            latest = (now, _server_context(identity, revoked))
        return latest[1]

    return current


def _server_context(identity: tls.Identity, revoked: Path) -> ssl.SSLContext:
    from edgefl.protocols import tls

    context = tls.server_context(identity, client_certificates=True)
    context.num_tickets = 0  # a session that is taken up again shows no certificate, which may be revoked by then
    if revoked.exists():
        context.load_verify_locations(revoked)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return context


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        seen = path.stat()  # of the file that a link leads to
    except FileNotFoundError:
        return None
    return seen.st_ino, seen.st_mtime_ns
