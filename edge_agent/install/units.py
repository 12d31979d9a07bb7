"""The systemd files of an installed agent: templates in `edge_agent/install/systemd`, filled in here and nowhere else.

`deploy/systemd` holds them as the defaults fill them in, for reading and for packagers; a test keeps
the two equal. Invariant: what a user passed stays one word: it is quoted, and neither `%` nor `$` acts.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from edge_agent.policy.rules import parse_policy
from edge_agent.training.site_network import endpoint, require_machines
from edgefl.errors import ConfigError

AGENT = "edgefl-agent.service"
SOCKET = "edgefl-trainer.socket"
TRAINER = "edgefl-trainer.service"
UNITS = (AGENT, SOCKET, TRAINER, "edgefl-training.slice")
UNIT_FOLDER = Path("/etc/systemd/system")
SYSUSERS = Path("/etc/sysusers.d/edgefl.conf")

_PATH = re.compile(r"/[A-Za-z0-9/._@:+-]*")
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,30}")
_MEMORY = re.compile(r"[1-9][0-9]*(?:[KMGT]|%)?|infinity")
_QUOTA = re.compile(r"[1-9][0-9]*%")
_HOMES = ("/home/", "/root/", "/run/user/")  # what ProtectHome=yes hides


@dataclass(frozen=True, kw_only=True, slots=True)
class Installation:
    """How the agent is to run on this device."""

    home: Path = Path("/var/lib/edgefl")
    user: str = "edgefl"
    data: Mapping[str, str] = field(default_factory=dict)  # options of the task's loaders
    serve_host: str = "127.0.0.1"
    serve_port: int = 8000
    serve_tls: bool = False
    serve_token_file: Path | None = None
    install_dependencies: bool = False
    site_rendezvous: str = ""  # HOST:PORT of this machine where others join its training; empty = none
    site_machines: int = 2
    policy: str = ""  # when it works for the fleet; empty = always
    memory_max: str = "80%"  # of training, as systemd says it; above the trainer's own limit, which fails more gently
    agent_memory_max: str = "40%"
    cpu_quota: str = ""  # of training: 150% is one and a half processors; empty = no limit
    python: Path = field(default_factory=lambda: Path(sys.executable))

    def __post_init__(self) -> None:
        for option, path in (("--home", self.home), ("the Python interpreter", self.python)):
            _refuse(_PATH, str(path), f"{option} {str(path)!r} must be an absolute path of letters, digits and ._@:+-")
        _refuse(_USER, self.user, f"--user {self.user!r} must be a user's name of a-z 0-9 _ -")
        if self.user == "root":
            raise ConfigError("--user root: the agent must run without privileges; drop --user, or name another user")
        for option, text in (("--memory-max", self.memory_max), ("--agent-memory-max", self.agent_memory_max)):
            _refuse(_MEMORY, text, f"{option} {text!r} must be like 2G, 500M or 60%")
        if self.site_rendezvous:
            endpoint(self.site_rendezvous)
        require_machines(self.site_machines)
        if self.policy:
            parse_policy(self.policy)
        if self.cpu_quota:
            _refuse(_QUOTA, self.cpu_quota, f"--cpu-quota {self.cpu_quota!r} must be like 150%")


def render(installation: Installation) -> dict[Path, str]:
    """Return the files of an installation: path and content."""
    values = _values(installation)
    rendered = {UNIT_FOLDER / name: _fill(name, values) for name in UNITS}
    return {**rendered, SYSUSERS: _fill(SYSUSERS.name, values)}


def settings_of(text: str) -> dict[str, str]:
    """Return the `Key=value` lines of a unit, or of what `systemctl show` prints."""
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def quote(word: str) -> str:
    """Quote a word for a command line of systemd; raises ConfigError for control characters."""
    if not word.isprintable():
        raise ConfigError(f"{word!r} contains control characters, which a systemd unit cannot hold; remove them")
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return escaped if re.fullmatch(r"[A-Za-z0-9/._@:+=,%$-]+", escaped) else f'"{escaped}"'


def _values(installation: Installation) -> dict[str, str]:
    data = [f" --data {quote(f'{key}={value}')}" for key, value in sorted(installation.data.items())]
    seen = (str(installation.home), str(installation.python), *installation.data.values())
    return {
        "PYTHON": str(installation.python),
        "HOME": str(installation.home),
        "USER": installation.user,
        "SERVE_HOST": quote(installation.serve_host),
        "SERVE_PORT": f"{installation.serve_port}{_guards(installation)}",
        "DATA": "".join(data),
        "MEMORY_MAX": installation.memory_max,
        "AGENT_MEMORY_MAX": installation.agent_memory_max,
        "CPU_QUOTA": f"CPUQuota={installation.cpu_quota}\n" if installation.cpu_quota else "",
        # Hidden, unless the agent itself lives there.
        "PROTECT_HOME": "read-only" if any(path.startswith(_HOMES) for path in seen) else "yes",
    }


def _guards(installation: Installation) -> str:
    token = installation.serve_token_file
    return (
        (" --serve-tls" if installation.serve_tls else "")
        + (f" --serve-token-file {quote(str(token))}" if token else "")
        + (" --install-dependencies" if installation.install_dependencies else "")
        + (_site(installation) if installation.site_rendezvous else "")
        + (f" --policy {quote(installation.policy)}" if installation.policy else "")
    )


def _site(installation: Installation) -> str:
    where = quote(installation.site_rendezvous)
    return f" --site-rendezvous {where} --site-machines {installation.site_machines}"


def _fill(name: str, values: Mapping[str, str]) -> str:
    template = files("edge_agent.install").joinpath("systemd", name).read_text(encoding="utf-8")
    return re.sub(r"@([A-Z_]+)@", lambda match: values[match[1]], template)


def _refuse(pattern: re.Pattern[str], text: str, message: str) -> None:
    if pattern.fullmatch(text) is None:
        raise ConfigError(message)
