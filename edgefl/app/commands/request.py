"""The arguments and flags of `edgefl simulate`, parsed once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgefl.errors import ConfigError
from edgefl.terminal.output import refuse_no_folder
from edgefl.terminal.pairs import pairs_of


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulateRequest:
    """The command's argument and flags."""

    task: str
    clients: int | None
    rounds: int | None
    engine: str
    address: str | None  # of a Ray cluster
    config: Path | None
    settings: tuple[str, ...]  # a.b=c
    run_config: tuple[str, ...] = ()  # for a Flower app, in Flower's syntax
    federation_config: tuple[str, ...] = ()
    sweep: tuple[str, ...]  # a.b=c,d
    data: tuple[str, ...]  # key=value
    evaluate_every: int
    out: Path | None
    plot: Path | None
    tensorboard: Path | None
    checkpoint: Path | None
    checkpoint_every: int
    resume: Path | None
    publish: str | None = None  # the name of a model

    def __post_init__(self) -> None:
        refuse_no_folder(self.out, "--out")
        refuse_no_folder(self.plot, "--plot")
        if self.plot is not None:
            from edgefl.simulation.screen.plot import refuse_unknown_format

            refuse_unknown_format(self.plot)
        if self.tensorboard is not None:
            from edgefl.simulation.screen.tensorboard import require_tensorboard

            require_tensorboard()
        if self.publish is not None:
            from edgefl.protocols.manifest import check_model_name

            check_model_name(self.publish)
        ones = {
            "--out": self.out, "--checkpoint": self.checkpoint, "--resume": self.resume, "--publish": self.publish,
        }  # fmt: skip
        if self.sweep and (given := [flag for flag, value in ones.items() if value is not None]):
            raise ConfigError(f"{given[0]} belongs to a single run; drop it or --sweep")

    def only_for_tasks(self) -> list[str]:
        """Return the given flags that mean nothing for a Flower app."""
        flags = {
            "--config": self.config, "--checkpoint": self.checkpoint, "--resume": self.resume,
            "--evaluate-every": self.evaluate_every > 1, "--address": self.address, "--publish": self.publish,
        }  # fmt: skip
        return [flag for flag, value in flags.items() if value]

    def refuse_flowers(self) -> None:
        """Raise ConfigError for flags that mean nothing for a task."""
        flags = {"--run-config": self.run_config, "--federation-config": self.federation_config}
        if given := [flag for flag, value in flags.items() if value]:
            raise ConfigError(f"{given[0]} is for Flower apps; configure a task with --set a.b=c or --config FILE")

    def over(self) -> tuple[str, ...]:
        """Return the settings, including the flags that are short forms of settings."""
        short = {"rounds.count": self.rounds, "population.clients": self.clients}
        return (*self.settings, *(f"{key}={value}" for key, value in short.items() if value is not None))

    def options(self) -> Mapping[str, str]:
        """Return the data options; raises ConfigError for an invalid one."""
        return pairs_of("--data", self.data)
