"""An operator's credentials: the cloud's address, the operator's token, and the CA to trust.

The cloud's first start writes them as operator.json into its home. Invariant: only its owner can read the
file, from its first byte on.
"""

from __future__ import annotations

import json
import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from edgefl.errors import ConfigError
from edgefl.protocols.addresses import is_loopback

ENVIRONMENT = "EDGEFL_CREDENTIALS"
FILE = "operator.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Credentials:
    """The cloud's address, the operator's token, and the CA to trust (PEM)."""

    url: str
    token: str
    ca: str


def write_operator_credentials(home: Path, url: str, token: str, ca_pem: bytes) -> Path:
    """Write HOME/operator.json with mode 0600; return its path."""
    path = home / FILE
    temporary = home / f".{FILE}.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        json.dump({"url": url, "token": token, "ca": ca_pem.decode()}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return path


def default_credentials() -> Path:
    """Return the path of the credentials that are used by default.

    $EDGEFL_CREDENTIALS, or the user's file; without either, those of the local fleet, if there is one.
    """
    if given := os.environ.get(ENVIRONMENT):
        return Path(given).expanduser()
    own, local = Path("~/.config/edgefl/operator.json").expanduser(), local_home() / "cloud" / FILE
    return local if local.exists() and not own.exists() else own


def local_home() -> Path:
    """Return the home of this user's local fleet (`edgefl local`)."""
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "edgefl" / "local"


def load_credentials(path: Path | None = None) -> Credentials:
    """Read credentials from a file, $EDGEFL_CREDENTIALS or ~/.config/edgefl; raises ConfigError."""
    path = path or default_credentials()
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return Credentials(url=str(facts["url"]), token=str(facts["token"]), ca=str(facts["ca"]))
    except OSError as cause:
        raise ConfigError(
            f"cannot read the operator's credentials {path}: {cause.strerror}. `edgefl cloud start` writes them to "
            f"{FILE} in its home: give that file with --credentials or ${ENVIRONMENT}, or copy it to "
            "~/.config/edgefl/operator.json."
        ) from cause
    except (ValueError, KeyError, TypeError) as cause:
        raise ConfigError(f"{path} is not the {FILE} of a cloud's home: {cause!r}. Copy the file again.") from cause


def tls_context(url: str, ca: str) -> ssl.SSLContext | bool:
    """Return TLS 1.3 pinned to a CA, or False for plain HTTP (loopback only); raises ConfigError."""
    parts = urlsplit(url)
    if parts.scheme == "http" and is_loopback(parts.hostname or ""):
        return False
    if parts.scheme != "https" or not parts.hostname:
        raise ConfigError(f"--cloud={url!r} is not of the form https://host:port (http:// is for loopback only)")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(cadata=ca)
    except (ssl.SSLError, ValueError) as cause:
        raise ConfigError(f"the credentials hold no CA certificate in PEM: {cause}. Copy {FILE} again.") from cause
    return context
