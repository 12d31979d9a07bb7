"""`edgefl agent join`: lend this machine's processes to the training of a site whose agent is on another machine.

It waits until the agent's machine has a training, takes part, and waits for the next; each end of the agent's trainer,
and each loss of the network, begins this anew.
The machines of a site trust each other without reserve: torch's rendezvous and its backends neither authenticate nor
encrypt, and this machine runs what the agent's machine sends. So their network must be theirs alone.
"""

from __future__ import annotations

import json
import logging
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import click

from edge_agent.training.site import SiteSettings, launch, num_processes
from edge_agent.training.site_network import endpoint, own_address, require_machines
from edgefl.config import AUTO
from edgefl.errors import ConfigError
from edgefl.logs import event, set_up_logging
from edgefl.protocols.backoff import Backoff
from edgefl.terminal.output import example
from edgefl.terminal.pairs import pairs_of

_log = logging.getLogger(__name__)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
TRY_S = 5.0  # to connect


@click.command(epilog=example("edgefl agent join --site-rendezvous 10.0.0.1:29400 --data samples=./samples"))
@click.option(
    "--site-rendezvous", required=True, metavar="HOST:PORT", help="As of `edgefl agent start` on its machine."
)
@click.option("--site-machines", default=2, show_default=True, help="As there; how many machines train together.")
@click.option("--processes", default=AUTO, show_default=True, help="On this machine; auto = one per GPU, else one.")
@click.option("--data", multiple=True, metavar="K=V", help="Replaces a data option of the agent on this machine.")
def join(site_rendezvous: str, site_machines: int, processes: str, data: Sequence[str]) -> None:
    """Train together with an agent on another machine, until SIGTERM or Ctrl-C.

    Machines of one site trust each other: use a network that is theirs alone. All need the same data.
    """
    set_up_logging()
    endpoint(site_rendezvous)
    require_machines(site_machines)
    if find_spec("torch") is None:  # a worker would only say so when the agent's machine trains
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    with tempfile.TemporaryDirectory(prefix="edgefl-site-") as folder:
        settings = SiteSettings(
            folder=folder, processes=_number(processes), rendezvous=site_rendezvous, machines=site_machines,
            leads=False, options=json.dumps(_located(pairs_of("--data", data))),
        )  # fmt: skip
        _Member(settings).run()


class _Member:
    """One machine's part in a site. A signal ends it."""

    def __init__(self, settings: SiteSettings) -> None:
        self._settings = settings
        self._ended = threading.Event()
        self._launcher: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        pauses = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        where = self._settings.rendezvous
        event(_log, logging.INFO, "site.waiting", rendezvous=where)
        while not self._ended.is_set():
            if self._is_open():
                event(_log, logging.INFO, "site.joining", rendezvous=where)
                self._launcher = launch(self._settings)
                status = self._launcher.wait()
                event(_log, logging.INFO, "site.left", rendezvous=where, status=status)
                pauses = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S)
            self._ended.wait(pauses.next_s())

    def _is_open(self) -> bool:
        """Whether the agent's machine trains: its rendezvous accepts connections."""
        try:
            own_address(self._settings.rendezvous, leads=False)
            socket.create_connection(endpoint(self._settings.rendezvous), TRY_S).close()
        except (OSError, ConfigError):
            return False
        return True

    def _end(self, _signal: int, _frame: object) -> None:
        self._ended.set()
        if self._launcher is not None:
            self._launcher.kill()  # its workers die with it


def _number(processes: str) -> int:
    if processes != AUTO and not (processes.isdigit() and int(processes) > 0):
        raise ConfigError(f"--processes {processes!r} must be a number above 0, or {AUTO}")
    return num_processes(AUTO if processes == AUTO else int(processes))


def _located(options: Mapping[str, str]) -> dict[str, str]:
    """Make relative paths that exist absolute, because a task runs in another folder."""
    return {key: str(Path(one).resolve()) if "/" in one and Path(one).exists() else one for key, one in options.items()}
