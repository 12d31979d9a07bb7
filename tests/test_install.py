"""What pyproject.toml promises, by real installations: any two extras go together, and what lacks one says which."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from edgefl.app.cli import cli
from edgefl.operator.credentials import write_operator_credentials
from edgefl.protocols import tls
from edgefl.terminal import extras
from tests.environments import LOCK, ROOT, Environment

EXTRAS = tuple(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"])
DIGITS, APP = str(ROOT / "examples" / "digits"), str(ROOT / "examples" / "flower-app")
HOME = ("--home", "home")
NOWHERE = ("--cloud", "https://127.0.0.1:1")  # nobody listens there

# Every command -> arguments that lead to its work, and the extras without which it cannot do that.
COMMANDS = {
    "agent doctor": (HOME, "agent"),
    "agent enroll": ((*HOME, *NOWHERE, "--token", "t", "--name", "n"), "agent"),
    "agent install": (("--dry-run", *HOME), "agent"),
    "agent join": (("--site-rendezvous", "127.0.0.1:1", "--site-machines", "2"), "agent,train"),
    "agent start": (HOME, "agent"),
    "agent status": (HOME, "agent"),
    "agent uninstall": (("--dry-run",), "agent"),
    "cloud broker-config": (HOME, "cloud"),
    "cloud generate": ((".", *HOME), "cloud"),
    "cloud start": ((*HOME, "--grpc-port", "0"), "cloud"),
    "cloud stages": (("m", *HOME), "cloud,stages"),
    "cloud status": (HOME, "cloud"),
    "cloud token": (HOME, "cloud"),
    "cloud train-stage": (HOME, "cloud,train"),
    "cloud tokens list": (HOME, "cloud"),
    "cloud tokens revoke": (("t", *HOME), "cloud"),
    "demo": ((), "agent,train,cloud,examples"),
    "devices assign": (("a", "--parents", "cloud", *NOWHERE), ""),
    "devices list": (NOWHERE, ""),
    "devices logs": (("a", *NOWHERE), ""),
    "devices remove": (("a", *NOWHERE), ""),
    "devices tree": (NOWHERE, ""),
    "jobs cancel": (("j", *NOWHERE), ""),
    "jobs compare": (("j", "k", *NOWHERE), ""),
    "jobs list": (NOWHERE, ""),
    "jobs logs": (("j", *NOWHERE), ""),
    "jobs pause": (("j", *NOWHERE), ""),
    "jobs plot": (("j", *NOWHERE), "sim"),
    "jobs resume": (("j", *NOWHERE), ""),
    "jobs show": (("j", *NOWHERE), ""),
    "jobs watch": (("j", *NOWHERE), ""),
    "local hold": (("--devices", "1", "--ready", "1"), "agent,cloud"),
    "local start": ((), "agent,cloud"),
    "local status": ((), "agent,cloud"),
    "local stop": ((), "agent,cloud"),
    "models adapter": (
        ("--task", DIGITS, "--parameters", "none.safetensors", "--out", "o", *NOWHERE),
        "train,examples",
    ),
    "models list": (NOWHERE, ""),
    "models publish": (("m", "--task", DIGITS, "--parameters", "none.safetensors", *NOWHERE), "train,examples"),
    "models show": (("m", *NOWHERE), ""),
    "new": (("a_task",), ""),
    "offload cuts": (("m", *NOWHERE), "train"),
    "offload export": (("m", "--cut", "c", "--out", "o", *NOWHERE), "train"),
    "offload plan": (("m", "--device", "5x", "--link", "1mbit,1ms", *NOWHERE), "train"),
    "offload profile": (("m", *NOWHERE), "train"),
    "offload publish": (("m", "--cut", "c", *NOWHERE), "train"),
    "offload publish-decoder": ((".", *NOWHERE), ""),
    "offload split-decoder": ((".", "--out", "o"), "train,offload"),
    "region start": (HOME, "cloud"),
    "rollout start": (("m", *NOWHERE), ""),
    "rollout status": (NOWHERE, ""),
    "run": ((DIGITS, *NOWHERE), "train,examples"),
    "simulate": ((DIGITS, "--clients", "2", "--rounds", "1", "--plot", "p.png"), "sim,examples"),
}
# Further ways into the same commands, each by another extra.
MORE = {
    "run": ((APP, *NOWHERE), "flower"),
    "simulate": ((APP, "--clients", "2"), "flower"),
    "simulate --engine ray": ((DIGITS, "--clients", "2", "--rounds", "1"), "sim,examples,ray"),
    "simulate --tensorboard board": ((DIGITS, "--clients", "2", "--rounds", "1"), "sim,examples,tensorboard"),
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our own wheel, built once; where it comes from is then this file."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(build, check=True, timeout=300)
    return next(folder.glob("edgefl_fleet-*.whl"))


@pytest.fixture
def environment(tmp_path: Path) -> Callable[[], Environment]:
    numbers = iter(range(1000))
    return lambda: Environment(tmp_path / f"venv-{next(numbers)}")


def leaves(command: click.Command | None, path: tuple[str, ...] = ()) -> Iterator[str]:
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from leaves(command.get_command(context, name), (*path, name))
    else:
        yield " ".join(path)


def test_every_command_stands_in_the_table() -> None:
    assert set(leaves(cli)) == COMMANDS.keys()


@pytest.mark.soak
@pytest.mark.parametrize("extra", EXTRAS)
def test_pip_resolves_each_extra_by_its_ranges(extra: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", f"{ROOT}[{extra}]"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.soak
@pytest.mark.parametrize("first", EXTRAS)
def test_any_extra_can_follow_any_other_in_one_environment(
    first: str, wheel: Path, environment: Callable[[], Environment]
) -> None:
    for second in EXTRAS:
        if second != first:
            one = environment()
            one.install(f"{wheel}[{first}]")
            one.check()
            one.install(f"{wheel}[{second}]")
            one.check()


@pytest.mark.soak
@pytest.mark.parametrize("extra", ["", *(extra for extra in EXTRAS if extra not in {"bench", "dev"})])
def test_a_command_that_lacks_an_extra_names_it(
    extra: str, wheel: Path, environment: Callable[[], Environment], tmp_path: Path
) -> None:
    bare = environment()
    bare.install(*LOCK, f"{wheel}[{extra}]" if extra else wheel)
    cwd = tmp_path / "elsewhere"
    cwd.mkdir()
    (cwd / "none.safetensors").touch()  # a missing file is told before a missing extra
    tls.create_ca(cwd)
    write_operator_credentials(cwd, "https://127.0.0.1:1", "t", (cwd / "ca.pem").read_bytes())
    commands = [(name.split(), *rest) for name, rest in [*COMMANDS.items(), *MORE.items()]]
    commands = [one for one in commands if one[0] not in [["cloud", "start"], ["agent", "start"]] or one[2] != extra]
    lines = [[*name, *arguments] for name, arguments, _ in commands]  # without what would run for ever
    done = bare.edgefl_each(lines, cwd=cwd, env={"EDGEFL_CREDENTIALS": cwd / "operator.json"})
    for (words, _, needed), (status, said) in zip(commands, done, strict=True):
        name = " ".join(words)
        assert "Traceback" not in said, f"{name}: {said}"
        absent = set(needed.split(",")) - {extra, ""}
        if absent:
            assert status == 1, f"{name}: {said}"
            assert re.search(rf"-m pip install 'edgefl-fleet\[({'|'.join([*absent, needed])})\] @ file:", said), (
                f"{name} does not say which of {absent} it lacks: {said}"
            )
    listed = bare.edgefl("--help", cwd=cwd).stdout
    for command, needed in extras.OF_COMMANDS.items():
        marked = re.search(rf"{command} +\(needs the \[{needed}\] extra\)", listed) is not None
        assert marked == (needed != extra), listed
