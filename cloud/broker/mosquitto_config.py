"""Configuration of a mosquitto with the same access rights as the built-in broker.

    require_certificate + use_identity_as_username   the certificate identifies a client
    use_username_as_clientid                         a client cannot disconnect another one by its client id
    acl_file                                         the rights of `topics.allowed`, as patterns
    crlfile                                          old certificates of devices, and those of removed devices
    pid_file                                         the process to which the cloud sends SIGHUP to reload certificates

Nothing is kept across a restart: an old retained state could show a dead device as online, and each device publishes
its state on connect and calls `Next` over gRPC for what it missed.
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
MAX_QUEUED = 100_000  # per client: one retained state per device of a large fleet
MAX_QUEUED_BYTES = 256 << 20  # per client: these states, twice
MAX_CONNECTIONS = 60_000

_CONFIG = """\
# mosquitto for an edgefl fleet, written by `edgefl cloud broker-config`.
# This folder also has ca.pem, cert.pem, key.pem and crl.pem; the user `mosquitto` must be able to read all of them.
# crl.pem lists the revoked certificates; mosquitto reloads it on SIGHUP. The cloud writes it when a device is removed,
# and sends the signal to the process in pid_file. If it has no permission to, edgefl-reload.path sends it. A broker
# on another machine downloads the list from https://CLOUD:9480/v1/crl, and is restarted when it changes: see
# edgefl-crl.timer. These units are in deploy/mosquitto.
#
# Each device needs one open file. For more than a thousand devices, run `ulimit -n 65536` before starting mosquitto by
# hand, or set LimitNOFILE=65536 in a drop-in of its unit (systemctl edit mosquitto). Keep max_connections below it.

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
    """Return mosquitto.conf for a broker whose files are in `folder` (absolute)."""
    if not folder.is_absolute():
        raise ConfigError(f"{folder} must be an absolute path, because the working directory of mosquitto is not known")
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


def broker_acl(owner: str = CLOUD_NAME) -> str:
    """Return mosquitto's ACL: %u is the CN of the client's certificate. `owner` is the cloud, or a region."""
    lines = [
        "# The rights of edgefl.protocols.topics.allowed, written by `edgefl cloud broker-config`.",
        *(f"pattern write {ROOT}/up/%u/{kind}" for kind in UP_KINDS),
        f"pattern read {ROOT}/down/%u/#",
        "",
        f"user {owner}",
        f"topic readwrite {ROOT}/#",
    ]
    return "\n".join(lines) + "\n"


def write_broker_config(folder: Path, host: str, port: int, owner: str = CLOUD_NAME) -> Path:
    """Write mosquitto.conf and acl into a folder that has the broker's `Identity` files and crl.pem.

    Returns the path of mosquitto.conf.
    """
    replace_file(folder / ACL_FILE, broker_acl(owner).encode())
    replace_file(folder / CONFIG_FILE, broker_config(folder, host, port).encode())
    return folder / CONFIG_FILE
