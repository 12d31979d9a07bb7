"""Configuration of a mosquitto that gives the same rights as the built-in broker.

    require_certificate + use_identity_as_username   a client is who its certificate says
    use_username_as_clientid                         nobody can end another's connection by its client id
    acl_file                                         the rights of `topics.allowed`, as patterns
    crlfile                                          certificates of devices that were removed or renewed theirs
    pid_file                                         whom the cloud tells (SIGHUP) to read its certificates again

Nothing is kept over a restart: a state that outlived its device would call the dead online, and each
device says again on connect what it is and asks over gRPC what it missed.
Source: mosquitto.conf(5), 2.0.11 and later.
"""

from __future__ import annotations

from pathlib import Path

from cloud.broker.packets import MAX_PACKET_BYTES
from edgefl.errors import ConfigError
from edgefl.process.home import replace_file
from edgefl.protocols.tls import CLOUD_NAME, Identity
from edgefl.protocols.topics import ROOT, UP_KINDS

CONFIG_FILE, ACL_FILE, CRL_FILE, PID_FILE = "mosquitto.conf", "acl", "crl.pem", "mosquitto.pid"
MAX_QUEUED = 100_000  # to one client: as many retained states as a large fleet has devices
MAX_QUEUED_BYTES = 256 << 20  # to one client: these states, twice
MAX_CONNECTIONS = 60_000

_CONFIG = """\
# mosquitto for an edgefl fleet, written by `edgefl cloud broker-config`.
# The folder holds ca.pem, cert.pem, key.pem and crl.pem too; all must be readable by the user `mosquitto`.
# crl.pem lists the certificates that were revoked, mosquitto reads it on SIGHUP. The cloud writes it at each
# removal and sends the signal to the process in pid_file. Where it may not, edgefl-reload.path does it. A broker
# on another machine gets the list from https://CLOUD:9480/v1/crl and is restarted when it changes: see
# edgefl-crl.timer. These units are in deploy/mosquitto.
#
# Each device is one open file: for more than a thousand, `ulimit -n 65536` before it is started by hand, or
# LimitNOFILE=65536 in a drop-in of its unit (systemctl edit mosquitto). max_connections is to stay below that.

per_listener_settings false
allow_anonymous false
acl_file {acl}
pid_file {pid}

listener {port} {host}
cafile {identity.ca}
certfile {identity.cert}
keyfile {identity.key}
crlfile {crl}
tls_version tlsv1.3
require_certificate true
use_identity_as_username true
use_username_as_clientid true

max_connections {max_connections}
max_packet_size {max_packet_size}
max_queued_messages {max_queued}
max_queued_bytes {max_queued_bytes}
max_inflight_messages 200
set_tcp_nodelay true
persistence false

log_dest stderr
log_type error
log_type warning
log_type notice
log_type information
"""


def broker_config(folder: Path, host: str, port: int) -> str:
    """Return mosquitto.conf for a broker whose files lie in `folder` (absolute)."""
    if not folder.is_absolute():
        raise ConfigError(f"{folder} must be an absolute path: mosquitto does not say where it looks from")
    return _CONFIG.format(
        acl=folder / ACL_FILE,
        crl=folder / CRL_FILE,
        pid=folder / PID_FILE,
        port=port,
        host=host,
        identity=Identity.in_folder(folder),
        max_packet_size=MAX_PACKET_BYTES,
        max_connections=MAX_CONNECTIONS,
        max_queued=MAX_QUEUED,
        max_queued_bytes=MAX_QUEUED_BYTES,
    )


def broker_acl() -> str:
    """Return mosquitto's ACL: %u is the CN of the client's certificate."""
    lines = [
        "# The rights of edgefl.protocols.topics.allowed, written by `edgefl cloud broker-config`.",
        *(f"pattern write {ROOT}/up/%u/{kind}" for kind in UP_KINDS),
        f"pattern read {ROOT}/down/%u/#",
        "",
        f"user {CLOUD_NAME}",
        f"topic readwrite {ROOT}/#",
    ]
    return "\n".join(lines) + "\n"


def write_broker_config(folder: Path, host: str, port: int) -> Path:
    """Write mosquitto.conf and acl into a folder that has the broker's Identity and crl.pem.

    Returns the path of mosquitto.conf.
    """
    replace_file(folder / ACL_FILE, broker_acl().encode())
    replace_file(folder / CONFIG_FILE, broker_config(folder, host, port).encode())
    return folder / CONFIG_FILE
