"""The addresses of a site's machines: which one is this machine's own, and on which interface."""

from __future__ import annotations

import socket

import psutil

from edgefl.errors import ConfigError

LOOPBACK = "lo"
MAX_MACHINES = 256


def endpoint(text: str) -> tuple[str, int]:
    """Return the host and the port of HOST:PORT; raises ConfigError."""
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--site-rendezvous {text!r} is not HOST:PORT, e.g. 10.0.0.1:29400")
    return host, int(port)


def own_address(rendezvous: str, *, leads: bool) -> str:
    """Return this machine's address in the site's network; raises ConfigError if there is none.

    The agent's machine has the rendezvous's own address; another one the address from which it reaches that.
    """
    host, port = endpoint(rendezvous)
    try:
        family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            if leads:
                probe.bind((target[0], 0))
            else:
                probe.connect(target)  # UDP: nothing is sent
            return str(probe.getsockname()[0])
    except OSError as cause:
        what = "is not an address of this machine, where the agent runs" if leads else "cannot be reached"
        raise ConfigError(f"--site-rendezvous {rendezvous}: {host} {what}: {cause}") from cause


def require_machines(number: int) -> None:
    """Raise ConfigError for a number of machines that cannot be a site's."""
    if not 2 <= number <= MAX_MACHINES:
        raise ConfigError(f"--site-machines {number} must be 2 or more, and at most {MAX_MACHINES}")


def interface_of(address: str) -> str:
    """Return the network interface that has an address; the loopback interface if none has."""
    for name, found in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in found):
            return name
    return LOOPBACK
