"""Who may ask for predictions: anybody on this machine; from elsewhere, who has a token or a certificate of the fleet.

With mutual TLS the device shows its own certificate, which names it `NAME.device.edgefl.internal`, and
clients show one of the same CA. A renewed certificate counts from the next connection on.
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from pathlib import Path

from edgefl.errors import ConfigError
from edgefl.protocols.addresses import is_loopback

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


def server_context(home: Path) -> ssl.SSLContext:
    """Return mutual TLS by the certificate of a home, as it is at each connection."""
    from edgefl.protocols import tls

    identity = tls.Identity.in_folder(home)
    first = tls.server_context(identity, client_certificates=True)
    latest = (_stamp(identity.cert), first)

    def renew(connection: ssl.SSLSocket | ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        nonlocal latest
        stamp = _stamp(identity.cert)
        if stamp != latest[0]:
            latest = (stamp, tls.server_context(identity, client_certificates=True))
        if latest[1] is not first:
            connection.context = latest[1]

    first.sni_callback = renew
    return first


def _stamp(path: Path) -> tuple[int, int]:
    seen = path.stat()  # of the file that a link leads to
    return seen.st_ino, seen.st_mtime_ns
