"""`edgefl agent install` and `uninstall`: the agent as a systemd service, and back.

Everything that may refuse (privileges, systemd, enrolment, an interpreter that the service's user can
run) comes before anything is written. With `--root DIR` the same files go into an image that is not
running, for those who build one. Invariant: `uninstall` takes away what `install` made; the home
stays, and with it the user that owns it, unless `--purge` is given.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import click

from edge_agent.install.units import AGENT, SOCKET, SYSUSERS, UNIT_FOLDER, UNITS, Installation, render, settings_of
from edge_agent.link.profile import load_profile
from edge_agent.serving.access import Access
from edgefl.errors import ConfigError, HomeError, InstallError
from edgefl.process.home import check_home, replace_file
from edgefl.terminal.output import Output, example, json_option
from edgefl.terminal.pairs import pairs_of

COMMAND_TIMEOUT_S = 120
_ENABLED = (SOCKET, AGENT)


def _data_options(_context: click.Context, _option: click.Parameter, given: Sequence[str]) -> dict[str, str]:
    return pairs_of("--data", given)


_ROOT_OPTION = click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default=Path("/"),
    help="Work in an image mounted here instead of on this machine.",
)


@click.command(epilog=example("edgefl agent install --home /var/lib/edgefl --data path=/srv/pictures"))
@click.option("--home", type=click.Path(path_type=Path), default=Path("/var/lib/edgefl"), show_default=True)
@click.option("--user", default="edgefl", show_default=True, help="User that runs the agent; created if missing.")
@click.option("--data", multiple=True, callback=_data_options, metavar="K=V", help="Passed to the task's loaders.")
@click.option("--serve-host", default="127.0.0.1", show_default=True, help="Address that predictions are served on.")
@click.option("--serve-port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option("--serve-tls", is_flag=True, help="Serve by mutual TLS: clients need a certificate of this fleet.")
@click.option("--serve-token-file", type=click.Path(path_type=Path), help="File with the clients' bearer token.")
@click.option("--install-dependencies", is_flag=True, help="Install packages that a task needs, for training only.")
@click.option("--site-rendezvous", default="", metavar="HOST:PORT", help="As of `edgefl agent start`.")
@click.option("--site-machines", default=2, show_default=True, help="How many machines train together.")
@click.option(
    "--policy", default="", metavar="TERM,...", help="When it works for the fleet, as `agent start` takes it."
)
@click.option("--memory-max", default="80%", show_default=True, help="Most memory training may use: 2G, 60%.")
@click.option("--agent-memory-max", default="40%", show_default=True, help="Most memory the agent may use.")
@click.option("--cpu-quota", default="", help="Most processor time training may use: 150% is one and a half.")
@click.option("--dry-run", is_flag=True, help="Print the files and change nothing.")
@_ROOT_OPTION
@json_option
def install(*, dry_run: bool, root: Path, output: Output, **options: object) -> None:
    """Make the enrolled agent a systemd service.

    It starts now, and at every boot of this machine.
    """
    installation = Installation(**options)  # type: ignore[arg-type]  # click made them by these names and types
    guarded = installation.serve_tls or installation.serve_token_file is not None
    Access(host=installation.serve_host, mutual_tls=guarded)  # the file itself is the agent's to read
    if dry_run:
        files = {str(path): text for path, text in render(installation).items()}
        for path, text in files.items():
            output.line(f"# ---- {path}\n{text}")
        output.result({"files": files})
        return
    install_files(installation, root)
    output.line(f"The agent is installed and starts with {root}." if _is_image(root) else "The agent is running.")
    output.line("  state:  systemctl status edgefl-agent")
    output.line("  log:    journalctl -u edgefl-agent -u edgefl-trainer")
    output.line(f"  check:  edgefl agent doctor --home {installation.home}")
    output.line("  undo:   edgefl agent uninstall")
    output.result({"home": str(installation.home), "root": str(root), "units": list(UNITS)})


@click.command(epilog=example("edgefl agent uninstall --purge"))
@click.option("--purge", is_flag=True, help="Remove the home and the user as well: keys, certificate, models.")
@_ROOT_OPTION
@json_option
def uninstall(*, purge: bool, root: Path, output: Output) -> None:
    """Stop the service and undo `install`. The home stays, unless --purge is given."""
    done = uninstall_files(root, purge=purge)
    for line in done:
        output.line(line)
    output.result({"done": done})


def install_files(installation: Installation, root: Path) -> None:
    """Write, enable and start; raises InstallError or HomeError before anything is changed."""
    _require_host(root)
    home = _inside(root, installation.home)
    try:
        load_profile(home)
    except HomeError as cause:
        raise HomeError(
            f"{cause}\nEnrol this device first, with a token from `edgefl cloud token`:\n  edgefl agent enroll "
            f"--home {installation.home} --cloud https://HOST:9480 --token TOKEN --name NAME"
        ) from cause
    rendered = render(installation)
    if not _user_exists(root, installation.user):
        _write(root, SYSUSERS, rendered[SYSUSERS])
        _run("systemd-sysusers", f"--root={root}", str(_inside(root, SYSUSERS)))
    owner = _owner(root, installation.user)
    if not _is_image(root):
        _require_runnable(installation, owner)
    _give(home, owner)
    for name in UNITS:
        _write(root, UNIT_FOLDER / name, rendered[UNIT_FOLDER / name])
    if _is_image(root):
        _run("systemctl", f"--root={root}", "enable", *_ENABLED)
    else:
        _run("systemctl", "daemon-reload")
        _run("systemctl", "enable", *_ENABLED)
        _run("systemctl", "restart", *_ENABLED)  # so that a repeated install applies changes


def uninstall_files(root: Path, *, purge: bool) -> list[str]:
    """Undo `install_files`; returns what was done, in words."""
    _require_host(root)
    unit = _inside(root, UNIT_FOLDER / AGENT)
    if not unit.exists():
        raise InstallError(f"{unit} does not exist: no agent is installed here")
    installed = settings_of(unit.read_text(encoding="utf-8"))
    home, user = Path(installed["WorkingDirectory"]), installed["User"]
    if _is_image(root):
        _run("systemctl", f"--root={root}", "disable", *_ENABLED)
    else:
        _run("systemctl", "disable", "--now", *_ENABLED)
        _run("systemctl", "stop", *UNITS)
    for name in UNITS:
        _inside(root, UNIT_FOLDER / name).unlink(missing_ok=True)
    if not _is_image(root):
        _run("systemctl", "daemon-reload")
    if not purge:
        return ["The agent is uninstalled.", f"Kept: {home} (keys, certificate, models) and its owner {user!r}."]
    return ["The agent is uninstalled.", *_purge(root, home, user)]


def _purge(root: Path, home: Path, user: str) -> list[str]:
    check_home(_inside(root, home), "agent")  # never a folder that is something else
    shutil.rmtree(_inside(root, home))
    done = [f"Removed: {home}."]
    if _inside(root, SYSUSERS).exists():  # the user is ours: `install` made it
        _inside(root, SYSUSERS).unlink()
        _run("userdel", *(("--prefix", str(root)) if _is_image(root) else ()), user)
        done.append(f"Removed: the user {user!r}.")
    return done


def _require_host(root: Path) -> None:
    if os.geteuid() != 0:
        raise InstallError("installing a service needs root: run it again with sudo")
    if shutil.which("systemctl") is None:
        raise InstallError("there is no systemctl: this host does not use systemd; start the agent by its own means "
                           "with `edgefl agent start`")  # fmt: skip
    if not _is_image(root) and not Path("/run/systemd/system").is_dir():
        raise InstallError("systemd does not run this host (a container?): use `edgefl agent start`, or --root for "
                           "an image")  # fmt: skip


def _require_runnable(installation: Installation, owner: tuple[int, int]) -> None:
    """Raise InstallError if the service's user cannot run this Python."""
    probe = [str(installation.python), "-P", "-c", "import edge_agent.training.trainer_main"]
    try:
        done = subprocess.run(
            probe, user=owner[0], group=owner[1], extra_groups=[], cwd="/", env={"PATH": os.defpath},
            capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False,
        )  # fmt: skip
    except PermissionError as cause:
        raise InstallError(_not_runnable(installation, str(cause))) from cause
    if done.returncode:
        raise InstallError(_not_runnable(installation, (done.stderr.strip().splitlines() or ["no output"])[-1]))


def _not_runnable(installation: Installation, seen: str) -> str:
    return (
        f"the user {installation.user!r} cannot run {installation.python} ({seen}). Install edgefl where all can read "
        'it, with the extras [agent,train], in /opt/edgefl for instance: see the README\'s "Install a device"'
    )


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except FileNotFoundError as cause:
        raise InstallError(f"there is no {command[0]} on this host") from cause
    except subprocess.TimeoutExpired as cause:
        raise InstallError(f"`{' '.join(command)}` did not end within {COMMAND_TIMEOUT_S} s") from cause
    if done.returncode:
        raise InstallError(
            f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip()}. "
            "More is in `journalctl -u edgefl-agent`."
        )


def _write(root: Path, path: Path, text: str) -> None:
    target = _inside(root, path)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_file(target, text.encode())
    target.chmod(0o644)


def _give(home: Path, owner: tuple[int, int]) -> None:
    for folder, _, names in os.walk(home):
        for path in (Path(folder), *(Path(folder, name) for name in names)):
            os.chown(path, *owner, follow_symlinks=False)


def _user_exists(root: Path, user: str) -> bool:
    return _find_owner(root, user) is not None


def _owner(root: Path, user: str) -> tuple[int, int]:
    owner = _find_owner(root, user)
    if owner is None:
        raise ConfigError(f"--user {user!r} could not be made; is the name taken by a group?")
    return owner


def _find_owner(root: Path, user: str) -> tuple[int, int] | None:
    """Return (uid, gid); of an image by its own passwd file, of this machine by whatever it asks."""
    if not _is_image(root):
        try:
            entry = pwd.getpwnam(user)
        except KeyError:
            return None
        return entry.pw_uid, entry.pw_gid
    passwd = _inside(root, Path("/etc/passwd"))
    for line in passwd.read_text(encoding="utf-8").splitlines() if passwd.exists() else ():
        name, _, uid, gid, *_ = line.split(":")
        if name == user:
            return int(uid), int(gid)
    return None


def _is_image(root: Path) -> bool:
    return root.resolve() != Path("/")


def _inside(root: Path, path: Path) -> Path:
    return root / path.relative_to("/")
