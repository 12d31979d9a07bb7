"""What a simulation is told beyond a job: `[population]`, in the same TOML file.

Who says nothing about devices has ideal ones, and rounds take what they take here. With
`[population.devices]` the rounds run in virtual time: see `edgefl.simulation.world.clock`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgefl.config import JobConfig, from_dict
from edgefl.errors import ConfigError
from edgefl.rounds import Fleet
from edgefl.simulation.engines.fleets import SimulationSetup
from edgefl.simulation.steps import has_compiler
from edgefl.simulation.study.checkpoint import Checkpoint
from edgefl.simulation.world.clock import VirtualClock, VirtualFleet
from edgefl.simulation.world.devices import Devices, DevicesConfig
from edgefl.simulation.world.population import PopulationConfig, sizes_of


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How the clients are trained, whatever the engine."""

    compile: bool = False  # steps by a C++ compiler: seconds to a minute at the start, a fifth or more less a step
    record: bool = True  # steps as lists of tensor operations; without, each is taken as on a device, more slowly

    def __post_init__(self) -> None:
        if self.compile and not self.record:
            raise ConfigError(
                "engine.compile=true makes code of recorded steps, which engine.record=false switches off; set one"
            )
        if self.compile and not has_compiler():
            raise ConfigError(
                "engine.compile=true needs a C++ compiler, and neither $CXX (or g++) nor clang++ is there. "
                "Install one, or leave the setting out."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulationConfig(JobConfig):
    """A job's sections, the population's, and the engine's."""

    population: PopulationConfig = field(default_factory=PopulationConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)


def with_arguments(
    config: JobConfig, *, clients: int | None, rounds: int | None, data: Mapping[str, str] | None
) -> SimulationConfig:
    """Return the configuration with what was said besides it."""
    sections: dict[str, Any] = {one.name: getattr(config, one.name) for one in dataclasses.fields(config)}
    population = sections.pop("population", PopulationConfig())
    if clients is not None:
        population = dataclasses.replace(population, clients=clients)
    if data:
        population = dataclasses.replace(population, data={**population.data, **data})
    if rounds is not None:
        sections["rounds"] = dataclasses.replace(config.rounds, count=rounds)
    return SimulationConfig(**sections, population=population)


def with_settings(config: SimulationConfig, settings: Mapping[str, Any]) -> SimulationConfig:
    """Return the configuration with `{"train.lr": 0.1}` over it; raises ConfigError naming the key at fault."""
    data = dataclasses.asdict(config)
    for key, value in settings.items():
        *sections, last = key.split(".")
        section: Any = data
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
            if not isinstance(section, dict):
                raise ConfigError(f"{key}={value!r}: the configuration has no section {name!r}")
        section[last] = value
    return from_dict(SimulationConfig, data)


@dataclass(frozen=True, slots=True)
class VirtualTime:
    """An engine's clients on their own machines."""

    fleet: Fleet
    clock: VirtualClock
    devices: Devices


def virtual_time(
    setup: SimulationSetup, config: SimulationConfig, engine: Fleet, saved: Checkpoint | None = None
) -> VirtualTime | None:
    """Put an engine into virtual time, where the configuration describes devices; as it was in a checkpoint."""
    if config.population.devices == DevicesConfig():
        return None
    clock = VirtualClock(saved.virtual_s or 0.0 if saved is not None else 0.0)
    devices = Devices(config.population.devices, setup.population.names(), config.population.seed)
    if saved is not None:
        devices.load(saved.spent)
    sizes = sizes_of(setup.task, setup.population, config.train.seed)
    fleet = VirtualFleet(
        engine, devices, clock, rounds=config.rounds, num_samples=sizes,
        first_round=saved.round + 1 if saved is not None else 1, served=setup.served.copy(),
    )  # fmt: skip
    return VirtualTime(fleet, clock, devices)
