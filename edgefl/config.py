"""Configuration: one TOML file, overridden by `--set a.b=c`, becomes frozen dataclasses that validate themselves.

dacite builds them; an unknown key is an error that names the known ones. Every number has bounds: those of the
type that holds it later (a lock's timeout, a database's integer, a float32), so that no round fails because of it.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, get_type_hints

import dacite

from edgefl.choosing.combined import LATE_NEXT, LATE_REFUSE, check_combined
from edgefl.choosing.expression import parse
from edgefl.choosing.settings import StopConfig, check_choice, check_share
from edgefl.errors import ConfigError
from edgefl.settings.server import EXACT, MAX_FRAGMENTS, UPDATE_WIRES, AggregationConfig, ServerConfig, TiersConfig
from edgefl.settings.split import SplitConfig, check_mode
from edgefl.terminal.bounds import (
    MAX_COUNT,
    MAX_RATE,
    MAX_SECONDS,
    require,
    require_above_zero,
    require_one_of,
    require_printable,
    require_within,
)
from edgefl.terminal.pairs import pair_of
from edgefl.terminal.values import shown_value

ALGORITHMS = ("fedavg", "fedsgd")
GRACE_NONE, GRACE_AUTO = "none", "auto"
STRATEGIES = ("ddp", "fsdp")
AUTO = "auto"
SCHEDULES = ("constant", "cosine", "step")
MAX_SEED = 2**63 - 1

MAX_WORKERS = 64  # limit of processes that read a Dataset
MAX_PROCESSES = 1024
MAX_RANK = 4096  # of adapters

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundsConfig:
    """How rounds are formed and when they end."""

    count: int = 10  # rounds of the job
    clients: int = 0  # updates to collect per round; 0 = from every client
    quorum: int = 1  # with fewer admitted updates than this, the job fails
    over_selection: float = 0.0  # the fraction of clients to ask in addition
    deadline_s: float = 600.0  # a round ends after so long; later updates do not count
    offline_grace_s: float = 5.0  # after so long offline, a device is no longer waited for
    grace: float | str = "none"  # wait for others after the quorum: seconds | auto: while it pays | none: as usual
    late: str = "refuse"  # an update that comes when its round is over: refuse | next: it is part of the next round
    wait_s: float = 60.0  # how long to wait until enough clients are online
    evaluate_every: int = 1  # devices evaluate in every k-th round and the last, if the task can; 0 = never
    select: str = ""  # only devices that meet this expression take part, e.g. mem_mb >= 512 and tag.site == 'plant-3'
    utility: str = "random"  # how the cohort is drawn: random | oort (useful and fast devices more often)
    fairness: float = 0.0  # oort: from 0 (by utility alone) to 1 (devices that took part in the fewest rounds first)
    stop: StopConfig = field(default_factory=StopConfig)  # when to end before the last round
    priority: int = 0  # on a fleet: a job of a higher priority gets devices first
    weight: float = 1.0  # on a fleet: the job's share of devices among jobs of the same priority
    shared_devices: bool = False  # on a fleet: also use devices that work for other jobs

    def __post_init__(self) -> None:
        require_within("rounds.count", self.count, 1, MAX_COUNT)
        require_within("rounds.clients", self.clients, 0, MAX_COUNT)
        require_within("rounds.quorum", self.quorum, 1, MAX_COUNT)
        require(
            self.clients == 0 or self.quorum <= self.clients,
            f"rounds.quorum={self.quorum} is above rounds.clients={self.clients}",
        )
        require_within("rounds.over_selection", self.over_selection, 0, 10)
        require_above_zero("rounds.deadline_s", self.deadline_s, MAX_SECONDS)
        require_within("rounds.offline_grace_s", self.offline_grace_s, 0, MAX_SECONDS)
        if isinstance(self.grace, str | bool):
            known = f"{GRACE_NONE}, {GRACE_AUTO}, or a number of seconds"
            seen = f"rounds.grace={shown_value(self.grace)}"
            require(self.grace in {GRACE_NONE, GRACE_AUTO}, f"{seen} is not one of: {known}")
        else:
            require_within("rounds.grace", self.grace, 0, MAX_SECONDS)
        require(
            self.late in {LATE_REFUSE, LATE_NEXT},
            f"rounds.late={shown_value(self.late)} is not one of: {LATE_REFUSE}, {LATE_NEXT}",
        )
        require_within("rounds.wait_s", self.wait_s, 0, MAX_SECONDS)
        require_within("rounds.evaluate_every", self.evaluate_every, 0, MAX_COUNT)
        if self.select:
            parse(self.select)
        check_choice(self.utility, self.clients, self.fairness)
        check_share(self.priority, self.weight)

    def evaluates_in(self, round_number: int) -> bool:
        """Whether devices evaluate the parameters that they receive in this round."""
        every = self.evaluate_every
        return every > 0 and (round_number % every == 0 or round_number == self.count)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """What a client does in a round."""

    algorithm: str = "fedavg"  # fedavg: local epochs, sends a delta; fedsgd: one exact gradient
    epochs: int = 1  # passes over the client's samples per round; 0 = `steps` says how much
    steps: int = 0  # training steps per round instead of epochs, over as many passes as that takes; 0 = epochs
    batch_size: int = 32  # samples per training step
    lr: float = 0.1  # learning rate of the local optimizer
    proximal_mu: float = 0.0  # FedProx (Li et al. 2020); 0 = off
    keep_optimizer_state: bool = False  # each client keeps the state of the task's optimizer between its rounds
    seed: int = 0  # of the first parameters and of all training
    schedule: str = "constant"  # of lr over the rounds: constant | cosine | step, after the warm-up
    warmup_rounds: int = 0  # lr rises until it has its full value in this round
    end_factor: float = 0.0  # cosine: the final lr, as a fraction of lr
    step_rounds: int = 10  # step: after so many rounds lr is multiplied by step_factor
    step_factor: float = 0.1  # step: see step_rounds
    workers: int = 0  # processes in which a device reads a Dataset ahead of the training; 0 = in the training's own
    processes: int | str = 1  # of a device's training, as torchrun starts them; auto = one per GPU
    strategy: str = "ddp"  # of several processes: ddp, or fsdp for a model that one device cannot hold
    lora_ranks: Sequence[int] = field(default_factory=list)  # of LoRA adapters: each client has one of these; [] = task
    backend: str = ""  # of their communication: gloo, nccl, xccl ..; empty = the usual one of the device
    round: int = 0  # number of the round, from 1; set in each round's plan, never by the user
    mode: str = "local"  # local: a device trains the whole model; split: its first layers, and the cloud the rest
    split: SplitConfig = field(default_factory=SplitConfig)  # of mode split
    fragments: int = 1  # `server.fragments`; set in each round's plan, never by the user
    wire: str = "exact"  # in which form an update goes up: exact | bf16 (half the bytes) | int8 (a quarter)

    def __post_init__(self) -> None:
        known = ", ".join(ALGORITHMS)
        require(self.algorithm in ALGORITHMS, f"train.algorithm={self.algorithm!r} is not one of: {known}")
        require_within("train.steps", self.steps, 0, MAX_COUNT)
        if self.steps:
            self._refuse_other_lengths()
            object.__setattr__(self, "epochs", 0)  # the default was not meant; an agent that knows no steps refuses it
        else:
            require_within("train.epochs", self.epochs, 1, MAX_COUNT)
        require_within("train.batch_size", self.batch_size, 1, MAX_COUNT)
        require_above_zero("train.lr", self.lr, MAX_RATE)
        require_within("train.proximal_mu", self.proximal_mu, 0, MAX_RATE)
        require_within("train.seed", self.seed, 0, MAX_SEED)
        schedules = ", ".join(SCHEDULES)
        require(self.schedule in SCHEDULES, f"train.schedule={self.schedule!r} is not one of: {schedules}")
        require_within("train.warmup_rounds", self.warmup_rounds, 0, MAX_COUNT)
        require_within("train.end_factor", self.end_factor, 0, 1)
        require_within("train.step_rounds", self.step_rounds, 1, MAX_COUNT)
        require_within("train.step_factor", self.step_factor, 0, 1)
        require_within("train.workers", self.workers, 0, MAX_WORKERS)
        require_within("train.round", self.round, 0, MAX_COUNT)
        require_within("train.fragments", self.fragments, 1, MAX_FRAGMENTS)
        require(
            not (self.keep_optimizer_state and self.algorithm == "fedsgd"),
            "train.keep_optimizer_state=true: fedsgd takes no local steps, so a client has no optimizer. Leave it out",
        )
        for rank in self.lora_ranks:
            require_within("train.lora_ranks", rank, 1, MAX_RANK)
        require_one_of("train.wire", self.wire, UPDATE_WIRES)
        self._check_processes()
        check_mode(self.mode, self.split, self.algorithm, self.processes)

    def _check_processes(self) -> None:
        number = self.processes
        if isinstance(number, bool) or (isinstance(number, str) and number != AUTO):
            raise ConfigError(f"train.processes={shown_value(number)} must be a whole number, or {AUTO!r}")
        if isinstance(number, int):
            require_within("train.processes", number, 1, MAX_PROCESSES)
        known = ", ".join(STRATEGIES)
        require(self.strategy in STRATEGIES, f"train.strategy={self.strategy!r} is not one of: {known}")
        require_printable("train.backend", self.backend)

    def _refuse_other_lengths(self) -> None:
        require(
            self.epochs in (0, 1),  # 1 is the default
            f"train.steps={self.steps} and train.epochs={self.epochs}: give one of them",
        )
        require(
            self.algorithm != "fedsgd",
            f"train.steps={self.steps}: fedsgd takes no local steps, but one gradient over all samples. Leave it out",
        )

    @property
    def keeps_state(self) -> bool:
        """Whether a client keeps anything between its rounds."""
        return self.keep_optimizer_state or self.fragments > 1

    def num_steps(self, num_samples: int) -> int:
        """Return the training steps of a client with so many samples in a round."""
        return self.steps or self.epochs * -(-num_samples // self.batch_size)

    def num_trained(self, num_samples: int) -> int:
        """Return the samples that all these steps have together; a sample counts each time."""
        if not self.steps:
            return self.epochs * num_samples
        passes, more = divmod(self.steps, -(-num_samples // self.batch_size))
        return passes * num_samples + more * self.batch_size


@dataclass(frozen=True, kw_only=True, slots=True)
class JobConfig:
    """All settings of one federated training. Sections as in the TOML file."""

    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    tiers: TiersConfig = field(default_factory=TiersConfig)

    def __post_init__(self) -> None:
        check_combined(
            algorithm=self.train.algorithm,
            mode=self.train.mode,
            region_rounds=self.tiers.region_rounds,
            fan_out=self.tiers.fan_out,
            late=self.rounds.late,
            fragments=self.server.fragments,
        )
        require(
            self.server.wire == EXACT or self.tiers.region_rounds == 1,
            f"server.wire={self.server.wire!r} needs tiers.region_rounds=1: in rounds of its own, a region sends the "
            "model as it is",
        )


def load_config(
    schema: type[_T], file: Path | None = None, settings: Iterable[str] = (), *, base: Mapping[str, Any] | None = None
) -> _T:
    """Build `schema` from a TOML file, else from `base`, its sections; `a.b=c` settings override it.

    Raises ConfigError.
    """
    data: dict[str, Any] = copy.deepcopy(dict(base or {}))
    if file is not None:
        try:
            data = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as cause:
            raise ConfigError(f"cannot read the configuration {file}: {cause.strerror}") from cause
        except (ValueError, RecursionError) as cause:  # also an integer with too many digits
            raise ConfigError(f"{file} is not TOML: {cause}") from cause
    for setting in settings:
        _apply(schema, data, setting)
    _refuse_both(data)
    return from_dict(schema, data)


Config: TypeAlias = JobConfig | Mapping[str, Any] | str | Path | None


def config_of(schema: type[JobConfig], config: Config, settings: Mapping[str, Any] | None = None) -> JobConfig:
    """Return a configuration from a dataclass (as it is), a TOML file's path or a mapping of sections; None = default.

    `settings` such as {"train.lr": 0.1} override it. Raises ConfigError.
    """
    if config is None:
        made = schema()
    elif isinstance(config, JobConfig):
        made = config
    elif isinstance(config, (str, Path)):
        made = load_config(schema, Path(config))
    elif isinstance(config, Mapping):
        _refuse_both(config)
        made = from_dict(schema, config)
    else:
        raise ConfigError(
            f"config is a {type(config).__name__}; expected a JobConfig, the path of a TOML file, or a mapping such as "
            '{"train": {"lr": 0.1}}'
        )
    return with_settings(schema, made, settings) if settings else made


def with_settings(schema: type[_T], config: Any, settings: Mapping[str, Any]) -> _T:
    """Return a configuration, overridden by `{"train.lr": 0.1}`; raises ConfigError with the wrong key."""
    data = dataclasses.asdict(config)
    for key, value in settings.items():
        *sections, last = key.split(".")
        section: Any = data
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
            if not isinstance(section, dict):
                raise ConfigError(f"{key}={value!r}: the configuration has no section {name!r}")
        section[last] = value
    return from_dict(schema, data)


def from_dict(schema: type[_T], data: Mapping[str, Any]) -> _T:
    """Build a dataclass tree from nested mappings; raises ConfigError naming the key at fault."""
    _refuse_unknown(schema, data, "")
    try:
        return dacite.from_dict(schema, dict(data), dacite.Config(type_hooks={float: _as_float}, strict=True))
    except dacite.WrongTypeError as cause:
        wanted = getattr(cause.field_type, "__name__", cause.field_type)
        raise ConfigError(f"{cause.field_path}={shown_value(cause.value)} must be of type {wanted}") from cause
    except dacite.DaciteError as cause:
        raise ConfigError(str(cause)) from cause


def _as_float(value: Any) -> Any:
    """Convert an integer to a float; one too large becomes infinity, which the bounds then refuse by name."""
    if type(value) is not int:
        return value
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def parse_value(text: str) -> Any:
    """Read a setting's value as TOML; a bare word is a string: --set server.optimizer=Adam."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError, KeyError):  # not TOML, too many digits, or nested too deeply
        return text


def _apply(schema: type[Any], data: dict[str, Any], setting: str) -> None:
    key, text = pair_of("--set", setting, "section.key=value")
    value = parse_value(text)
    *sections, last = key.split(".")
    if not isinstance(value, str) and _type_of(schema, sections, last) is str:
        value = text  # such as --set train.split.cut=6: on a command line, a name may look like a number
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {setting!r}: {section!r} is a value, not a section")
    data[last] = value


def _type_of(schema: Any, sections: Sequence[str], key: str) -> Any:
    """Return the type of a key; None if there is no such key."""
    for section in sections:
        schema = get_type_hints(schema).get(section) if dataclasses.is_dataclass(schema) else None
    return get_type_hints(schema).get(key) if dataclasses.is_dataclass(schema) else None


def _refuse_both(data: Mapping[str, Any]) -> None:
    """Raise ConfigError where a user gives both lengths of a round, even if one is the default."""
    train = data.get("train")
    if isinstance(train, Mapping) and train.get("epochs") and train.get("steps"):
        raise ConfigError(
            f"train.steps={shown_value(train['steps'])} and train.epochs={shown_value(train['epochs'])}: give one of "
            "them, or set the other to 0"
        )


def _refuse_unknown(schema: type[Any], data: Any, path: str) -> None:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path.rstrip('.')}={shown_value(data)} must be a section")
    hints = get_type_hints(schema)
    for key, value in data.items():
        if key not in hints:
            known = ", ".join(sorted(hints))
            raise ConfigError(f"unknown configuration key {shown_value(path + str(key))}; known here: {known}")
        if isinstance(value, bool) and hints[key] in {int, float}:  # in Python a bool is an int
            raise ConfigError(f"{path}{key}={value} must be of type {hints[key].__name__}")
        if dataclasses.is_dataclass(hints[key]) and isinstance(hints[key], type):
            _refuse_unknown(hints[key], value, f"{path}{key}.")
