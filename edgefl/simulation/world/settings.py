"""Settings of a simulation in addition to a job's: `[population]` and `[engine]`, in the same TOML file.

Without settings for devices they are ideal, and a round takes the real time on this machine. With
`[population.devices]` the rounds run in virtual time: see `edgefl.simulation.world.clock`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgefl.choosing.history import History
from edgefl.config import JobConfig
from edgefl.errors import ConfigError
from edgefl.exchange import Durations
from edgefl.rounds import Fleet
from edgefl.simulation.engines.fleets import SimulationSetup
from edgefl.simulation.selection import ClientSelection
from edgefl.simulation.steps import has_compiler
from edgefl.simulation.study.checkpoint import Checkpoint
from edgefl.simulation.world.clock import VirtualClock, VirtualFleet
from edgefl.simulation.world.devices import Devices, DevicesConfig
from edgefl.simulation.world.population import PopulationConfig, sizes_of
from edgefl.simulation.world.tiers import TieredFleet


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How clients are trained, for every engine."""

    compile: bool = False  # compile steps with C++: costs up to a minute at the start, saves a fifth or more per step
    record: bool = True  # record steps as lists of tensor operations; false: compute them as on a device, slower

    def __post_init__(self) -> None:
        if self.compile and not self.record:
            raise ConfigError(
                "engine.compile=true compiles recorded steps, which engine.record=false switches off; set only one"
            )
        if self.compile and not has_compiler():
            raise ConfigError(
                "engine.compile=true needs a C++ compiler, but neither $CXX (or g++) nor clang++ was found. "
                "Install one, or drop the setting."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulationConfig(JobConfig):
    """A job's sections, the population's, and the engine's."""

    population: PopulationConfig = field(default_factory=PopulationConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)


def with_arguments(
    config: JobConfig, *, clients: int | None, rounds: int | None, data: Mapping[str, str] | None
) -> SimulationConfig:
    """Return the configuration, overridden by a call's arguments."""
    sections: dict[str, Any] = {one.name: getattr(config, one.name) for one in dataclasses.fields(config)}
    population = sections.pop("population", PopulationConfig())
    if clients is not None:
        population = dataclasses.replace(population, clients=clients)
    if data:
        population = dataclasses.replace(population, data={**population.data, **data})
    if rounds is not None:
        sections["rounds"] = dataclasses.replace(config.rounds, count=rounds)
    return SimulationConfig(**sections, population=population)


@dataclass(frozen=True, slots=True)
class VirtualTime:
    """An engine in virtual time."""

    fleet: VirtualFleet
    clock: VirtualClock
    devices: Devices


def make_selection(setup: SimulationSetup, config: SimulationConfig, history: History) -> ClientSelection | None:
    """Return which clients meet `rounds.select`; None if all may take part. Raises ConfigError for an unknown field."""
    if not config.rounds.select:
        return None
    devices = Devices(config.population.devices, setup.population.names(), config.population.seed)
    sizes = sizes_of(setup.task, setup.population, config.train.seed)
    return ClientSelection(config.rounds.select, devices, config.population.tags, sizes, history)


def virtual_time(
    setup: SimulationSetup, config: SimulationConfig, engine: Fleet, saved: Checkpoint | None = None,
    tiered: TieredFleet | None = None, selection: ClientSelection | None = None,
) -> VirtualTime | None:  # fmt: skip
    """Put an engine into virtual time, if devices are configured; restores the state of a checkpoint.

    `tiered` is the engine's clients below regions, if there are any.
    """
    if config.population.devices == DevicesConfig():
        return None
    clock = VirtualClock(saved.virtual_s or 0.0 if saved is not None else 0.0)
    devices = Devices(config.population.devices, setup.population.names(), config.population.seed)
    if saved is not None:
        devices.load(saved.spent)
    sizes = sizes_of(setup.task, setup.population, config.train.seed)
    fleet = VirtualFleet(
        tiered or engine, devices, clock, rounds=config.rounds, num_samples=sizes, tiered=tiered,
        first_round=saved.round + 1 if saved is not None else 1, served=setup.served.copy(),
        meets=None if selection is None else selection.meets, states=setup.states,
    )  # fmt: skip
    if saved is not None:
        fleet.durations = Durations.from_json(saved.durations)
    return VirtualTime(fleet, clock, devices)
