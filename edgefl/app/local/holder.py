"""A fleet on this machine that stays until it is stopped: a cloud and devices as real processes over TLS.

One process holds the fleet, in the background and in a session of its own; its home keeps jobs, releases and enrolled
devices from one start to the next. If the holder ends for any reason, so do its processes.
Invariant: one holder for each home, by the home's lock.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from edgefl.errors import ConfigError, EdgeflError, HomeError, ProcessFailed
from edgefl.local_fleet import LocalFleet, free_ports
from edgefl.process.home import home_holder, lock_home, replace_file
from edgefl.terminal.interrupt import ended_by_sigterm

START_S = 180.0
STOP_S = 30.0
FIRST_SERVING_PORT = 8000
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # the devices share this machine's cores
_STATE = "state.json"
_READY = "ready"


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalState:
    """A running local fleet."""

    url: str  # of the cloud
    credentials: str  # path of the operator.json
    devices: dict[str, str]  # name -> the URL that serves its predictions
    regions: dict[str, str] = field(default_factory=dict)  # name -> its URL


def running(home: Path) -> LocalState | None:
    """Return the fleet that runs in this home, None if none does or it is still starting."""
    if home_holder(home) is None:
        return None
    try:
        return LocalState(**json.loads((home / _STATE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def start(home: Path, devices: int, regions: int | None = None) -> LocalState:
    """Start a fleet in the background and wait until its devices are online; one that runs is returned as it is.

    `regions`: how many regions are between the cloud and the devices, which take turns; None = as before, or none.
    Raises ConfigError if another number of devices or regions runs, ProcessFailed if the fleet cannot be started.
    """
    if (found := running(home)) is not None:
        for what, asked, there in (("devices", devices, found.devices), ("regions", regions, found.regions)):
            if asked is not None and len(there) != asked:
                raise ConfigError(
                    f"a local fleet of {len(there)} {what} is running already, asked for: {asked}. "
                    "End it with `edgefl local stop`, or ask for as many"
                )
        return found
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    reading, writing = os.pipe()
    command = [sys.executable, "-P", "-m", "edgefl", "local", "hold", "--home", str(home), "--devices", str(devices)]
    command += [] if regions is None else ["--regions", str(regions)]
    with (home / "local.log").open("ab") as log:
        holder = subprocess.Popen(
            [*command, "--ready", str(writing)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(writing,),
            start_new_session=True,
        )  # fmt: skip
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:  # noqa: PTH123 - a file descriptor
        said = _read_within(pipe.fileno(), START_S)
    if said != _READY:
        holder.terminate()
        raise ProcessFailed(said or f"the local fleet did not start; its log {home / 'local.log'} says why")
    state = running(home)
    if state is None:
        raise ProcessFailed(f"the local fleet ended after its start; its log {home / 'local.log'} says why")
    return state


def stop(home: Path) -> bool:
    """End the fleet and wait for it; False if none runs. Raises ProcessFailed if it does not end."""
    import psutil

    holder = home_holder(home)
    if holder is None:
        return False
    try:
        process = psutil.Process(holder.pid)
        process.terminate()
        process.wait(STOP_S)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired as cause:
        raise ProcessFailed(f"process {holder.pid} did not end within {STOP_S:g} s; end it with kill -9") from cause
    return True


def hold(home: Path, devices: int, ready: int, regions: int | None = None) -> None:
    """Run the fleet until SIGTERM; `ready` is a pipe for the word that it serves, or for what went wrong."""
    with os.fdopen(ready, "w", encoding="utf-8") as pipe:
        try:
            lock = lock_home(home)
        except HomeError as error:
            pipe.write(str(error))
            return
        state = home / _STATE
        with lock, contextlib.suppress(KeyboardInterrupt), ended_by_sigterm(), LocalFleet(home) as fleet:
            state.unlink(missing_ok=True)
            try:
                _start_all(home, fleet, devices, regions)
            except EdgeflError as error:
                pipe.write(str(error))
                return
            pipe.write(_READY)
            pipe.close()
            try:
                while True:
                    signal.pause()
            finally:
                state.unlink(missing_ok=True)


def _start_all(home: Path, fleet: LocalFleet, devices: int, asked: int | None) -> None:
    _take_ports(home, fleet)
    regions = _take_regions(home, fleet, asked)
    fleet.start()
    for region in regions:
        fleet.start_region(region)
    names = [f"local-{number}" for number in range(devices)]
    for number, name in enumerate(names):
        if not (home / name / "home.json").exists():
            fleet.enroll(name, region=regions[number % len(regions)] if regions else "")
        data = ("--data", f"part={number}", "--data", f"parts={devices}")
        port = _free_or_any(FIRST_SERVING_PORT + number)
        fleet.start_agent(name, *data, "--serve-port", str(port), env=ONE_THREAD)
    for name in names:
        fleet.wait_online(name)
    urls = {name: (home / name / "serving").read_text(encoding="ascii").strip() for name in names}
    where = {region: fleet.url_of(region) for region in regions}
    state = LocalState(url=fleet.url, credentials=str(fleet.credentials), devices=urls, regions=where)
    replace_file(home / _STATE, json.dumps(asdict(state)).encode())


def _take_ports(home: Path, fleet: LocalFleet) -> None:
    """Use the ports of the first start again: enrolled devices know them."""
    file = home / "ports.json"
    with contextlib.suppress(FileNotFoundError):
        fleet.use_ports(json.loads(file.read_text(encoding="utf-8")))
        return
    replace_file(file, json.dumps(fleet.ports).encode())


def _take_regions(home: Path, fleet: LocalFleet, asked: int | None) -> list[str]:
    """Return the names of the regions; those of the first start, with their ports, because devices know them."""
    file = home / "regions.json"
    if file.exists():
        fleet.region_ports = json.loads(file.read_text(encoding="utf-8"))
        if asked is not None and asked != len(fleet.region_ports):
            raise ConfigError(
                f"the local fleet in {home} has {len(fleet.region_ports)} regions, asked for: {asked}. Its devices are "
                "enrolled there; take another --home"
            )
        return sorted(fleet.region_ports)
    regions = [f"region-{number}" for number in range(asked or 0)]
    fleet.region_ports = {region: free_ports(3) for region in regions}
    replace_file(file, json.dumps(fleet.region_ports).encode())
    return regions


def _free_or_any(port: int) -> int:
    """Return the port if it is free, else 0 for any."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return 0
    return port


def _read_within(descriptor: int, timeout_s: float) -> str:
    """Read a pipe to its end; empty if that takes too long."""
    said, deadline_s = b"", time.monotonic() + timeout_s
    while select.select([descriptor], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
        part = os.read(descriptor, 65536)
        if not part:
            return said.decode(errors="replace").strip()
        said += part
    return ""
