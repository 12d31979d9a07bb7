"""One TOML file, and `--set a.b=c` over it, into frozen dataclasses validated at birth.

dacite does the building; an unknown key is an error that names the known ones.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import dacite

from edgefl.errors import ConfigError

ALGORITHMS = ("fedavg", "fedsgd")

_T = TypeVar("_T")


def _require(condition: bool, message: str) -> None:  # noqa: FBT001 - reads as a sentence
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundsConfig:
    """How rounds are formed and when they end."""

    count: int = 10
    clients: int = 0  # wanted updates a round; 0 = every client there is
    quorum: int = 1  # fewer admitted updates than this fail the job
    over_selection: float = 0.0  # asks this fraction of clients more than wanted
    deadline_s: float = 600.0
    offline_grace_s: float = 5.0  # a device offline for so long is not waited for
    wait_s: float = 60.0  # for enough clients to be online

    def __post_init__(self) -> None:
        _require(self.count >= 1, f"rounds.count={self.count} must be 1 or more")
        _require(self.clients >= 0, f"rounds.clients={self.clients} must be 0 (all) or more")
        _require(self.quorum >= 1, f"rounds.quorum={self.quorum} must be 1 or more")
        _require(
            self.clients == 0 or self.quorum <= self.clients,
            f"rounds.quorum={self.quorum} is above rounds.clients={self.clients}",
        )
        _require(0 <= self.over_selection <= 10, f"rounds.over_selection={self.over_selection} must be in 0..10")
        _require(0 < self.deadline_s < math.inf, f"rounds.deadline_s={self.deadline_s} must be above 0 and finite")
        _require(
            0 <= self.offline_grace_s < math.inf,
            f"rounds.offline_grace_s={self.offline_grace_s} must be 0 or more, and finite",
        )
        _require(0 <= self.wait_s < math.inf, f"rounds.wait_s={self.wait_s} must be 0 or more, and finite")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """What a client does in a round."""

    algorithm: str = "fedavg"  # fedavg: local epochs, sends a delta; fedsgd: one exact gradient
    epochs: int = 1
    batch_size: int = 32
    lr: float = 0.1  # of the local optimizer
    proximal_mu: float = 0.0  # FedProx (Li et al. 2020); 0 = off
    seed: int = 0

    def __post_init__(self) -> None:
        known = ", ".join(ALGORITHMS)
        _require(self.algorithm in ALGORITHMS, f"train.algorithm={self.algorithm!r} is not one of: {known}")
        _require(self.epochs >= 1, f"train.epochs={self.epochs} must be 1 or more")
        _require(self.batch_size >= 1, f"train.batch_size={self.batch_size} must be 1 or more")
        _require(0 < self.lr < math.inf, f"train.lr={self.lr} must be above 0 and finite")
        mu = self.proximal_mu
        _require(0 <= mu < math.inf, f"train.proximal_mu={mu} must be 0 or more, and finite")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """The step at the centre: a `torch.optim` optimizer over the aggregated update."""

    optimizer: str = "SGD"  # any name in torch.optim; plain SGD needs no torch
    lr: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)  # e.g. momentum = 0.9

    def __post_init__(self) -> None:
        _require(0 < self.lr < math.inf, f"server.lr={self.lr} must be above 0 and finite")


@dataclass(frozen=True, kw_only=True, slots=True)
class AggregationConfig:
    """Which rule turns updates into one."""

    rule: str = "mean"


@dataclass(frozen=True, kw_only=True, slots=True)
class JobConfig:
    """Everything one federated training is told. Sections as in the TOML file."""

    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)


def load_config(schema: type[_T], file: Path | None = None, settings: Iterable[str] = ()) -> _T:
    """Build `schema` from a TOML file with `a.b=c` settings over it; raises ConfigError."""
    data: dict[str, Any] = {}
    if file is not None:
        try:
            data = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as cause:
            raise ConfigError(f"cannot read the configuration {file}: {cause.strerror}") from cause
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as cause:
            raise ConfigError(f"{file} is not TOML: {cause}") from cause
    for setting in settings:
        _apply(data, setting)
    return from_dict(schema, data)


def from_dict(schema: type[_T], data: Mapping[str, Any]) -> _T:
    """Build a dataclass tree from nested mappings; raises ConfigError naming the key at fault."""
    _refuse_unknown(schema, data, "")
    try:
        hooks = {float: lambda value: float(value) if type(value) is int else value}
        return dacite.from_dict(schema, dict(data), dacite.Config(type_hooks=hooks, strict=True))
    except dacite.WrongTypeError as cause:
        wanted = getattr(cause.field_type, "__name__", cause.field_type)
        raise ConfigError(f"{cause.field_path}={cause.value!r} must be of type {wanted}") from cause
    except dacite.DaciteError as cause:
        raise ConfigError(str(cause)) from cause


def parse_value(text: str) -> Any:
    """Read a setting's value as TOML; a bare word is a string: --set server.optimizer=Adam."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _apply(data: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {setting!r} is not of the form section.key=value")
    value = parse_value(text)
    *sections, last = key.strip().split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {setting!r}: {section!r} is a value, not a section")
    data[last] = value


def _refuse_unknown(schema: type[Any], data: Any, path: str) -> None:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path.rstrip('.')}={data!r} must be a section")
    hints = get_type_hints(schema)
    for key, value in data.items():
        if key not in hints:
            raise ConfigError(f"unknown configuration key {path + str(key)!r}; known here: {', '.join(sorted(hints))}")
        if dataclasses.is_dataclass(hints[key]) and isinstance(hints[key], type):
            _refuse_unknown(hints[key], value, f"{path}{key}.")
