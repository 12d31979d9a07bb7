"""The state of this machine that a policy judges: processor use of others, battery, network, local time.

Whether a network is metered is NetworkManager's to say, asked by `busctl`, else by `nmcli`. Where it does not run, the
interface of the default route is judged by /sys: mobile broadband is metered, a cable is not, of Wi-Fi nothing says.
"""

from __future__ import annotations

import datetime
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil

from edge_agent.policy.rules import MachineState

COMMAND_S = 5.0  # time limit of each command that is asked
_BUSCTL = (
    "busctl", "--system", "get-property", "org.freedesktop.NetworkManager", "/org/freedesktop/NetworkManager",
    "org.freedesktop.NetworkManager", "Metered",
)  # fmt: skip
_NMCLI = ("nmcli", "--get-values", "GENERAL.METERED", "device", "show")
_NM_METERED = {"1": True, "3": True, "2": False, "4": False}  # NMMetered: yes, guessed yes, no, guessed no
_ETHERNET, _PPP = "1", "512"  # ARPHRD_* in /sys/class/net/*/type


class Machine:
    """Measures this machine. Calls take up to some seconds; not for several threads at once."""

    def __init__(self, trainer_pid: Callable[[], int | None], root: Path = Path("/")) -> None:
        self._trainer_pid, self._root = trainer_pid, root
        self._busy_s, self._all_s = _processor_times()
        self._trained_s: dict[int, float] = {}  # process of the trainer -> its processor time
        self._trained_s = self._trainer_times()

    def measure(self) -> MachineState:
        """Return the state; processor use is the mean since the last call."""
        metered, why = self.metered()
        battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
        now = datetime.datetime.now().astimezone()
        busy_percent = self._busy_percent()
        unknown = {
            "idle": "no processor time has passed since the last look" if busy_percent is None else "",
            "unmetered": why,
            "charging": "the battery does not say whether it charges"
            if battery and battery.power_plugged is None
            else "",
        }
        return MachineState(
            busy_percent=busy_percent,
            on_mains=True if battery is None else battery.power_plugged,
            metered=metered,
            minute=now.hour * 60 + now.minute,
            unknown={term: reason for term, reason in unknown.items() if reason},
        )

    def metered(self) -> tuple[bool | None, str]:
        """Return whether the network is metered, or None and why that is not known."""
        for command in (_BUSCTL, _NMCLI):
            answer = _output_of(command)
            metered = _said_by_busctl(answer) if command is _BUSCTL else _said_by_nmcli(answer)
            if metered is not None:
                return metered, ""
        return self._by_interface()

    def _by_interface(self) -> tuple[bool | None, str]:
        interface = _default_interface(self._root / "proc/net/route")
        if not interface:
            return None, "NetworkManager does not answer, and there is no default route"
        folder = self._root / "sys/class/net" / interface
        kind, facts = _text(folder / "type").strip(), _text(folder / "uevent")
        if "DEVTYPE=wwan" in facts or kind == _PPP:
            return True, ""
        if kind == _ETHERNET and "DEVTYPE=wlan" not in facts and not (folder / "wireless").exists():
            return False, ""
        return None, f"NetworkManager does not answer, and {interface} does not say what it costs"

    def _busy_percent(self) -> float | None:
        """Return the processors' use without the trainer, in percent of all of them."""
        busy_s, all_s = _processor_times()
        trained = self._trainer_times()
        own_s = sum(max(0.0, seconds - self._trained_s.get(pid, 0.0)) for pid, seconds in trained.items())
        passed_s, used_s = all_s - self._all_s, busy_s - self._busy_s
        self._busy_s, self._all_s, self._trained_s = busy_s, all_s, trained
        return None if passed_s <= 0 else max(0.0, 100 * (used_s - own_s) / passed_s)

    def _trainer_times(self) -> dict[int, float]:
        pid = self._trainer_pid()
        if not pid:
            return {}
        found: dict[int, float] = {}
        try:
            trainer = psutil.Process(pid)
            processes = [trainer, *trainer.children(recursive=True)]
        except psutil.Error:
            return {}
        for process in processes:
            try:
                times = process.cpu_times()
            except psutil.Error:  # it has just ended
                continue
            found[process.pid] = times.user + times.system
        return found


def _processor_times() -> tuple[float, float]:
    """Return (seconds of work, seconds in all) of all processors since the machine's start."""
    times = psutil.cpu_times()._asdict()
    counted = {name: seconds for name, seconds in times.items() if not name.startswith("guest")}  # in user, too
    idle_s = counted["idle"] + counted.get("iowait", 0.0) + counted.get("steal", 0.0)
    return sum(counted.values()) - idle_s, sum(counted.values())


def _output_of(command: tuple[str, ...]) -> str:
    """Return what a command prints; empty if it is not there, fails or takes too long."""
    program = shutil.which(command[0])
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, *command[1:]], capture_output=True, text=True, timeout=COMMAND_S, check=True, errors="replace"
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _said_by_busctl(answer: str) -> bool | None:
    return _NM_METERED.get(answer.removeprefix("u ").strip())


def _said_by_nmcli(answer: str) -> bool | None:
    """Return whether any device is metered; None if nmcli knows it of none."""
    said = [line.split()[0] for line in answer.splitlines() if line.strip()]
    return "yes" in said if {"yes", "no"} & set(said) else None


def _default_interface(routes: Path) -> str:
    """Return the interface of the default route with the lowest metric; empty if there is none."""
    rows = [line.split() for line in _text(routes).splitlines()[1:]]
    default = [(int(row[6]), row[0]) for row in rows if len(row) > 7 and row[1] == row[7] == "00000000"]
    return min(default, default=(0, ""))[1]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
