"""Who may request predictions: any client on this machine; others need a token or a certificate of the fleet.

With mutual TLS the device presents its own certificate, for `NAME.device.edgefl.internal`. Clients present one that
the same CA signed and that is not on the list of revoked certificates (`edge_agent/serving/revoked.py`).
A renewed certificate or a new list takes effect with the next connection.
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

REVOKED_FILE = "revoked.pem"  # in a home: the list of revoked certificates (CRL), once downloaded
MIN_TOKEN_CHARS = 16
_TOKEN = re.compile(rb"[A-Za-z0-9._~+/=-]+")  # RFC 6750


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """How the serving port is protected; raises ConfigError if a network could use it without a token or TLS."""

    host: str
    token_file: Path | None = None
    mutual_tls: bool = False

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and self.token_file is None and not self.mutual_tls:
            raise ConfigError(
                f"--serve-host {self.host} opens predictions to the network without protection. Add "
                "--serve-tls (clients then need a certificate of this fleet) or --serve-token-file FILE (clients "
                "then send the file's content as a bearer token; put TLS in front), or serve on 127.0.0.1"
            )
        self.token()

    def token(self) -> str:
        """Return the token that clients must send; empty = none. Raises ConfigError."""
        if self.token_file is None:
            return ""
        try:
            text = self.token_file.read_bytes().strip()
        except OSError as cause:
            raise ConfigError(f"--serve-token-file {self.token_file} cannot be read: {cause.strerror}") from cause
        if len(text) < MIN_TOKEN_CHARS or _TOKEN.fullmatch(text) is None:
            raise ConfigError(
                f"--serve-token-file {self.token_file} must contain one token of at least {MIN_TOKEN_CHARS} letters, "
                "digits or ._~+/=-; `openssl rand -hex 32` makes one"
            )
        return text.decode()


def server_contexts(home: Path) -> Callable[[], ssl.SSLContext]:
    """Return a function that returns the TLS context for a new connection, with the home's current files.

    It raises OSError while one of the files cannot be read: then all clients are refused.
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
    context.num_tickets = 0  # a resumed session presents no certificate, which may have been revoked since
    if revoked.exists():
        context.load_verify_locations(revoked)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return context


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        seen = path.stat()  # follows links
    except FileNotFoundError:
        return None
    return seen.st_ino, seen.st_mtime_ns
