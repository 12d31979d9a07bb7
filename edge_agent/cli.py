"""`edgefl agent ...`: enrol a device, run its agent, look at it, and install it as a service."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from edgefl.errors import ConfigError
from edgefl.logs import set_up_logging
from edgefl.terminal.output import Output, example, json_option
from edgefl.terminal.pairs import pairs_of

if TYPE_CHECKING:
    from edge_agent.generation.supervisor import GenerationConfig

MAX_TOKEN_CHARS = 4096

_ELSEWHERE = {  # command -> module that has it
    "install": "edge_agent.install.service",
    "uninstall": "edge_agent.install.service",
    "doctor": "edge_agent.install.doctor",
    "join": "edge_agent.training.join",
}


class _LazyCommands(click.Group):
    """Imports a command's module when the command is called, so that `start` does not load what it does not need."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_ELSEWHERE])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _ELSEWHERE:
            module = import_module(_ELSEWHERE[cmd_name])
            command: click.Command = getattr(module, cmd_name)
            return command
        return super().get_command(ctx, cmd_name)


@click.group(cls=_LazyCommands)
def agent() -> None:
    """Make this machine a device of a fleet.

    The agent trains on the data here, installs releases and serves their predictions.
    """


_HOME = click.option(
    "--home",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder for everything that the agent stores.",
)


@agent.command(
    epilog=example(
        "edgefl agent enroll --home ~/edgefl --cloud https://cloud.example:9480 --token-file token.txt --name cam-3",
        "edgefl cloud token --home HOME | ssh cam-3 edgefl agent enroll --home ~/edgefl --cloud URL --token-file - "
        "--name cam-3",
    )
)
@_HOME
@click.option("--cloud", required=True, metavar="URL", help="The cloud's address, https://host:9480.")
@click.option("--token", help="A one-time token; `edgefl cloud token` prints one. Others on this machine can see it in "
                              "the list of processes: prefer --token-file.")  # fmt: skip
@click.option("--token-file", type=click.File(encoding="utf-8"), help="File with the token; - for stdin.")
@click.option("--name", required=True, help="The device's name: 1 to 64 of a-z 0-9 . _ -")
@click.option("--tag", "tags", multiple=True, metavar="K=V", help="A label, such as site=oslo. Repeatable.")
@json_option
def enroll(  # noqa: PLR0913 - one a flag
    *, home: Path, cloud: str, token: str | None, token_file: TextIO | None, name: str, tags: Sequence[str],
    output: Output,
) -> None:  # fmt: skip
    """Enrol this device in a fleet, with a token by --token-file or --token."""
    from edge_agent.link.enroll import EnrolmentRequest
    from edge_agent.link.enroll import enroll as apply

    request = EnrolmentRequest(cloud=cloud, token=_token(token, token_file), name=name, tags=pairs_of("--tag", tags))
    profile = apply(home, request)
    output.line(f"{profile.device} is enrolled; start it with: edgefl agent start --home {home}")
    output.result({"device": profile.device, "home": str(home), "cloud": profile.cloud_url})


@agent.command(epilog=example("edgefl agent start --home ~/edgefl --data part=0"))
@_HOME
@click.option(
    "--data",
    multiple=True,
    metavar="K=V",
    help="An option for the task's data loaders. Repeatable. Relative paths such as ./pictures are resolved here.",
)
@click.option(
    "--serve-host",
    default="127.0.0.1",
    show_default=True,
    help="Address to serve predictions on; other than loopback needs --serve-tls or --serve-token-file.",
)
@click.option("--serve-port", default=8000, show_default=True, help="0 = any free port.")
@click.option("--serve-tls", is_flag=True, help="Serve by mutual TLS: clients need a certificate of this fleet.")
@click.option(
    "--serve-token-file", type=click.Path(path_type=Path), help="File with the bearer token that clients send."
)
@click.option("--serve-memory-mb", default=0, help="Memory limit for predictions; 0 = a third of the machine's.")
@click.option(
    "--generate", type=click.Path(path_type=Path), metavar="FOLDER",
    help="Generate texts at /v1 of the serving port, with the head of a language model (or a whole one) in FOLDER, of "
         "`edgefl offload split-decoder`.",
)  # fmt: skip
@click.option("--generate-tail", default="", metavar="HOST:PORT", help="Where `edgefl cloud generate` serves its tail.")
@click.option("--generate-format", default="fp16", show_default=True, type=click.Choice(["fp32", "fp16", "bf16"]),
              help="Format of what is sent to the tail.")  # fmt: skip
@click.option("--generate-memory-mb", default=0, help="Memory limit of its process; 0 = the machine's.")
@click.option("--model-load-s", default=60.0, show_default=True, help="Time limit to load a release.")
@click.option("--trainer-memory-mb", default=0, help="Memory limit for training; 0 = three quarters of the machine's.")
@click.option(
    "--trainer-idle-s",
    default=60.0,
    show_default=True,
    help="Keep an idle trainer process, also for the next job of the same task, for this time.",
)
@click.option(
    "--trainer-socket",
    type=click.Path(path_type=Path),
    help="Socket of a trainer run by systemd.",
)
@click.option(
    "--placement", default="", metavar="auto|device|cloud|split:NODE",
    help="Where releases that can be split run. [default: as the release says]",
)  # fmt: skip
@click.option(
    "--stages", multiple=True, metavar="HOST:PORT",
    help="Where a stage server is; repeatable, in the order in which they are tried. [default: as the release says]",
)  # fmt: skip
@click.option(
    "--policy", default="", metavar="TERM,...",
    help="Work for the fleet only if all terms hold: idle, charging, unmetered, hours such as 22:00-06:00.",
)  # fmt: skip
@click.option(
    "--install-dependencies", is_flag=True,
    help="Install packages that a task needs and this device lacks, with pip, for the trainer only.",
)  # fmt: skip
@click.option(
    "--site-rendezvous", default="", metavar="HOST:PORT",
    help="Train together with other machines, which run `edgefl agent join`; HOST is an address of this one.",
)  # fmt: skip
@click.option("--site-machines", default=2, show_default=True, help="How many machines train together.")
@click.option(
    "--parent-lease-s", default=15.0, show_default=True,
    help="Leave a parent that was not reached for this time, for the next one in the list of this device "
         "(`edgefl devices assign`).",
)  # fmt: skip
@click.option(
    "--parent-return", default="idle", show_default=True, type=click.Choice(["idle", "now", "never"]),
    help="When to come back to an earlier parent that answers again: without a round to work for, at once, or never.",
)  # fmt: skip
@click.option("--log-level", default="info", show_default=True, type=click.Choice(["debug", "info", "warning"]))
def start(log_level: str, data: Sequence[str], parent_lease_s: float, parent_return: str, **options: Any) -> None:
    """Run the agent until SIGTERM or Ctrl-C."""
    from edge_agent.agent import run_agent
    from edge_agent.config import AgentConfig
    from edge_agent.link.lease import LeasePolicy, ReturnPolicy
    from edgefl.process.descriptors import raise_limit

    raise_limit()
    set_up_logging(logging.getLevelNamesMapping()[log_level.upper()])
    parents = LeasePolicy(lease_s=parent_lease_s, comes_back=ReturnPolicy(parent_return))
    texts = {name: options.pop(name) for name in list(options) if name.startswith("generate")}
    config = AgentConfig(
        data=_located(pairs_of("--data", data)), parents=parents, generation=_generation(**texts),
        generate_memory_mb=texts["generate_memory_mb"], **options,
    )  # fmt: skip
    asyncio.run(run_agent(config))


@agent.command(epilog=example("edgefl agent status --home ~/edgefl --json -"))
@_HOME
@json_option
def status(home: Path, output: Output) -> None:
    """Show whether an agent runs, is connected and trains, what it serves, and its last error.

    Exit status 0 only if it runs and reaches the cloud.
    """
    from edge_agent.install.status import read_status

    facts = dataclasses.asdict(read_status(home))
    for name, value in facts.items():
        output.line(f"{name.replace('_', ' '):20} {_shown(value)}")
    output.result(facts)
    if not facts["healthy"]:
        raise click.exceptions.Exit(1)


def _generation(
    generate: Path | None, generate_tail: str, generate_format: str, generate_memory_mb: int
) -> GenerationConfig | None:
    from edge_agent.generation.supervisor import GenerationConfig

    if generate is not None:
        return GenerationConfig(
            folder=generate, tail=generate_tail, format=generate_format, memory_mb=generate_memory_mb
        )  # fmt: skip
    if generate_tail:
        raise ConfigError("--generate-tail is for --generate FOLDER, which is missing; a release says itself where its "
                          "tail is")  # fmt: skip
    return None


def _token(token: str | None, file: TextIO | None) -> str:
    if (token is None) == (file is None):
        raise ConfigError("give the token once: --token-file FILE, --token-file - for stdin, or --token TOKEN")
    if token is not None:
        return token
    text = "" if file is None else file.read(MAX_TOKEN_CHARS).strip()
    if not text:
        raise ConfigError("--token-file is empty; `edgefl cloud token` prints a token")
    return text


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        texts = any(isinstance(one, str) for one in value.values())
        value = ("; " if texts else " ").join(
            f"{model}:{' ' if texts else ''}{one}" for model, one in sorted(value.items())
        )
    if isinstance(value, list):
        value = " ".join(value)
    return "-" if value == "" else str(value)


def _located(options: Mapping[str, str]) -> dict[str, str]:
    """Make relative paths that exist absolute, because a task runs in its own working folder."""
    return {
        key: str(Path(value).resolve()) if "/" in value and Path(value).exists() else value
        for key, value in options.items()
    }
