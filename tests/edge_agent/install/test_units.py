"""The systemd files: what stands in them, that systemd accepts them, and that words stay words."""

from __future__ import annotations

import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from edge_agent.cli import agent
from edge_agent.install.units import AGENT, SOCKET, SYSUSERS, TRAINER, UNIT_FOLDER, UNITS, Installation, quote, render
from edge_agent.training import trainer_wire as wire
from edgefl.errors import ConfigError

DEPLOY = Path(__file__).parents[3] / "deploy" / "systemd"


def unit(name: str, **options: Any) -> list[str]:
    return render(Installation(**options))[UNIT_FOLDER / name].splitlines()


def test_the_agent_by_hand() -> None:
    lines = unit(AGENT, home=Path("/srv/fl"), user="pi", python=Path("/opt/edgefl/bin/python"), data={"part": "3"})
    start = "/opt/edgefl/bin/python -P -m edgefl agent start --home /srv/fl --trainer-socket /run/edgefl/trainer.sock"
    assert f"ExecStart={start} \\" in lines
    assert "    --serve-host 127.0.0.1 --serve-port 8000 --data part=3" in lines
    for line in (
        "Type=notify", "Restart=on-failure", "User=pi", "ReadWritePaths=/srv/fl", "ProtectSystem=strict",
        "ProtectHome=yes", "NoNewPrivileges=yes", "CapabilityBoundingSet=", "SystemCallFilter=@system-service",
    ):  # fmt: skip
        assert line in lines
    assert any(line.startswith("WatchdogSec=") for line in lines)


def command_line(name: str, **options: Any) -> list[str]:
    text = render(Installation(**options))[UNIT_FOLDER / name].replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if line.startswith("ExecStart=")]
    return shlex.split(line.removeprefix("ExecStart="))


def test_the_agent_understands_how_it_is_started() -> None:
    python, *words = command_line(AGENT, serve_host="0.0.0.0", serve_port=9000, data={"part": "3"})  # noqa: S104
    assert (python, words[:5]) == (sys.executable, ["-P", "-m", "edgefl", "agent", "start"])
    start = agent.get_command(click.Context(agent), "start")
    assert start is not None
    given = start.make_context("start", words[5:]).params
    assert (given["home"], given["trainer_socket"]) == (Path("/var/lib/edgefl"), Path("/run/edgefl/trainer.sock"))
    assert (given["serve_host"], given["serve_port"], given["data"]) == ("0.0.0.0", 9000, ("part=3",))  # noqa: S104


def test_what_guards_the_serving_port_is_passed_on() -> None:
    words = command_line(AGENT, serve_host="::", serve_tls=True, serve_token_file=Path("/etc/a token"))
    assert words[words.index("--serve-host") :] == [
        "--serve-host", "::", "--serve-port", "8000", "--serve-tls", "--serve-token-file", "/etc/a token",
    ]  # fmt: skip


def test_a_sites_rendezvous_is_passed_on() -> None:
    assert "--site-machines" not in command_line(AGENT)
    words = command_line(AGENT, site_rendezvous="10.0.0.1:29400", site_machines=3)
    start = words.index("--site-rendezvous")
    assert words[start : start + 4] == ["--site-rendezvous", "10.0.0.1:29400", "--site-machines", "3"]
    with pytest.raises(ConfigError, match="is not HOST:PORT"):
        Installation(site_rendezvous="10.0.0.1")


def test_whether_packages_may_be_installed_is_passed_on() -> None:
    assert "--install-dependencies" not in command_line(AGENT)
    assert command_line(AGENT, install_dependencies=True).count("--install-dependencies") == 1


@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="systemd is not installed here")
def test_systemd_can_hand_the_trainer_its_socket(tmp_path: Path) -> None:
    """The trainer unit's own command, behind a listening socket of systemd's: it answers who connects."""
    path = tmp_path / "trainer.sock"
    command = ["systemd-socket-activate", "-l", path, *command_line(TRAINER)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as activation:
        try:
            assert activation.stderr is not None
            assert "Listening on" in activation.stderr.readline()
            with socket.socket(socket.AF_UNIX) as agent_side:
                agent_side.settimeout(60)
                agent_side.connect(str(path))
                head = agent_side.recv(wire.HEAD_BYTES, socket.MSG_WAITALL)
                hello = wire.parse(agent_side.recv(wire.body_bytes(head), socket.MSG_WAITALL))
            assert hello == wire.Hello(pid=activation.pid)  # systemd's helper has become the trainer
            activation.wait(30)  # it ends when the agent goes
        finally:
            activation.kill()


def test_training_has_a_unit_a_slice_and_limits_of_its_own() -> None:
    lines = unit(TRAINER, memory_max="2G", cpu_quota="150%")
    for line in ("Slice=edgefl-training.slice", "MemoryMax=2G", "CPUQuota=150%", "Nice=10"):
        assert line in lines
    assert "CPUWeight=20" in unit("edgefl-training.slice")
    assert "CPUWeight=400" in unit(AGENT)
    assert "Slice=edgefl.slice" in unit(AGENT)  # beside the training, or the weights would not compare
    assert not any(line.startswith("CPUQuota") for line in unit(TRAINER))


def test_the_socket_is_the_users_alone() -> None:
    lines = unit(SOCKET, user="pi")
    for line in ("ListenStream=/run/edgefl/trainer.sock", "SocketUser=pi", "SocketMode=0600"):
        assert line in lines


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, "ProtectHome=yes"),
        ({"home": Path("/home/pi/fl")}, "ProtectHome=read-only"),
        ({"python": Path("/home/pi/venv/bin/python")}, "ProtectHome=read-only"),
        ({"data": {"path": "/home/pi/pictures"}}, "ProtectHome=read-only"),
    ],
)
def test_homes_are_hidden_unless_the_agent_needs_one(options: dict[str, Any], wanted: str) -> None:
    assert wanted in unit(AGENT, **{"python": Path("/usr/bin/python3"), **options})


def test_no_placeholder_is_left() -> None:
    for path, text in render(Installation()).items():
        assert not [word for word in text.split() if word.count("@") > 1], path


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed here")
@pytest.mark.parametrize(
    "options",
    [{}, {"cpu_quota": "50%", "memory_max": "1G", "data": {"label": '50% of "it" costs $5 \\ year', "part": "3"}}],
)
def test_systemd_accepts_them_without_a_word(tmp_path: Path, options: dict[str, Any]) -> None:
    for path, text in render(Installation(**options)).items():
        (tmp_path / path.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", *(tmp_path / name for name in UNITS)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed here")
@pytest.mark.parametrize("name", [AGENT, TRAINER])
def test_systemd_rates_the_hardening(tmp_path: Path, name: str) -> None:
    """`systemd-analyze security` gives 0 (sealed) to 10 (open); a plain service has 9.6."""
    (tmp_path / name).write_text(render(Installation())[UNIT_FOLDER / name])
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=35", tmp_path / name],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


@pytest.mark.parametrize(
    ("word", "quoted"),
    [
        ("part=3", "part=3"),
        ("/srv/a b", '"/srv/a b"'),
        ("50%", "50%%"),
        ("$HOME", "$$HOME"),
        ('say "x"', '"say \\"x\\""'),
        ("a\\b", '"a\\\\b"'),
        ("a;b", '"a;b"'),
        ("", '""'),
        ("é", '"é"'),
    ],
)
def test_a_word_stays_a_word(word: str, quoted: str) -> None:
    assert quote(word) == quoted


@pytest.mark.parametrize("word", ["a\nExecStartPre=/bin/rm", "a\0", "a\tb"])
def test_a_word_cannot_become_a_line(word: str) -> None:
    with pytest.raises(ConfigError, match="contains control characters"):
        render(Installation(data={"x": word}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"home": Path("relative")}, "--home 'relative' must be an absolute path"),
        ({"home": Path("/srv/a b")}, "--home '/srv/a b'"),
        ({"home": Path("/srv\nUser=root")}, "--home"),
        ({"python": Path("/opt/%h/python")}, "the Python interpreter"),
        ({"user": "root"}, "--user root"),
        ({"user": "pi\nUser=root"}, "--user"),
        ({"user": "0"}, "--user '0'"),
        ({"memory_max": "much"}, "--memory-max 'much' must be like 2G"),
        ({"agent_memory_max": "-1"}, "--agent-memory-max '-1'"),
        ({"cpu_quota": "1.5"}, "--cpu-quota '1.5' must be like 150%"),
    ],
)
def test_what_cannot_be_is_refused_by_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        Installation(**options)
    assert message in str(refusal.value)


def test_deploy_shows_what_is_installed() -> None:
    """Written anew by running this file as a program."""
    shown = {path.name: path.read_text() for path in DEPLOY.iterdir()}
    assert shown == as_deployed()


def as_deployed() -> dict[str, str]:
    rendered = render(Installation(python=Path("/opt/edgefl/bin/python")))
    return {path.name: text for path, text in rendered.items()}


if __name__ == "__main__":
    assert SYSUSERS.name in as_deployed()
    for name, text in as_deployed().items():
        (DEPLOY / name).write_text(text)
        sys.stdout.write(f"{DEPLOY / name}\n")
