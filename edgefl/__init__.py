"""edgefl: edge-cloud federated learning. The public API: every name that a caller needs can be imported from here.

That is every error, configuration and result, and the functions that use them: `Task`, `run`, `simulate`, `sweep`.
Each name is imported when it is first used, so that `import edgefl` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgefl.process.version import __version__ as __version__

if TYPE_CHECKING:
    from edgefl.choosing.settings import StopConfig
    from edgefl.config import JobConfig, RoundsConfig, TrainConfig, load_config
    from edgefl.errors import (
        AccuracyGateFailed,
        BlobDamaged,
        CloudRefused,
        CloudStopping,
        CloudUnreachable,
        ConfigError,
        DeviceUnavailable,
        DiskFull,
        EdgeflError,
        EnrolmentRefused,
        HomeError,
        HostError,
        InstallError,
        JobCancelled,
        JobFailed,
        JobPaused,
        ManifestRejected,
        MissingExtra,
        NotFound,
        NotMeasurable,
        OwnFault,
        ParentLeft,
        ParityError,
        PartFailed,
        ProcessFailed,
        ProtocolError,
        QuorumNotMet,
        RolloutFailed,
        SignatureChanged,
        StepFailed,
        TaskError,
        TrainerLost,
        UpdateRejected,
        UploadCutOff,
    )
    from edgefl.flower.run import FlowerRunResult
    from edgefl.operator.run import RunResult, run
    from edgefl.records import RoundReport
    from edgefl.settings.server import AggregationConfig, ServerConfig, TiersConfig
    from edgefl.settings.split import SplitConfig
    from edgefl.simulation.simulate import Watching, simulate
    from edgefl.simulation.study.report import CutShort, ProcessLost, SimulationResult
    from edgefl.simulation.study.sweep import SweepResult, SweepWatching, VariantResult, sweep
    from edgefl.simulation.study.variants import Variant
    from edgefl.simulation.world.availability import AvailabilityConfig
    from edgefl.simulation.world.devices import DevicesConfig
    from edgefl.simulation.world.draws import Spread
    from edgefl.simulation.world.population import PopulationConfig
    from edgefl.simulation.world.settings import EngineConfig, SimulationConfig
    from edgefl.task import EvalResult, FitResult, Task
    from edgefl.training.metrics import WholeSet

_NAMES = {
    "edgefl.choosing.settings": ("StopConfig",),
    "edgefl.config": (
        "JobConfig",
        "RoundsConfig",
        "TrainConfig",
        "load_config",
    ),
    "edgefl.errors": (
        "AccuracyGateFailed",
        "BlobDamaged",
        "CloudRefused",
        "CloudStopping",
        "CloudUnreachable",
        "ConfigError",
        "DeviceUnavailable",
        "DiskFull",
        "EdgeflError",
        "EnrolmentRefused",
        "HomeError",
        "HostError",
        "InstallError",
        "JobCancelled",
        "JobFailed",
        "JobPaused",
        "ManifestRejected",
        "MissingExtra",
        "NotFound",
        "NotMeasurable",
        "OwnFault",
        "ParentLeft",
        "ParityError",
        "PartFailed",
        "ProcessFailed",
        "ProtocolError",
        "QuorumNotMet",
        "RolloutFailed",
        "SignatureChanged",
        "StepFailed",
        "TaskError",
        "TrainerLost",
        "UpdateRejected",
        "UploadCutOff",
    ),
    "edgefl.flower.run": ("FlowerRunResult",),
    "edgefl.operator.run": ("RunResult", "run"),
    "edgefl.records": ("RoundReport",),
    "edgefl.simulation.simulate": ("Watching", "simulate"),
    "edgefl.simulation.study.report": ("CutShort", "ProcessLost", "SimulationResult"),
    "edgefl.simulation.study.sweep": ("SweepResult", "SweepWatching", "VariantResult", "sweep"),
    "edgefl.simulation.study.variants": ("Variant",),
    "edgefl.simulation.world.availability": ("AvailabilityConfig",),
    "edgefl.simulation.world.devices": ("DevicesConfig",),
    "edgefl.simulation.world.draws": ("Spread",),
    "edgefl.simulation.world.population": ("PopulationConfig",),
    "edgefl.simulation.world.settings": ("EngineConfig", "SimulationConfig"),
    "edgefl.settings.server": ("AggregationConfig", "ServerConfig", "TiersConfig"),
    "edgefl.settings.split": ("SplitConfig",),
    "edgefl.task": ("EvalResult", "FitResult", "Task"),
    "edgefl.training.metrics": ("WholeSet",),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "AccuracyGateFailed",
    "AggregationConfig",
    "AvailabilityConfig",
    "BlobDamaged",
    "CloudRefused",
    "CloudStopping",
    "CloudUnreachable",
    "ConfigError",
    "CutShort",
    "DeviceUnavailable",
    "DevicesConfig",
    "DiskFull",
    "EdgeflError",
    "EngineConfig",
    "EnrolmentRefused",
    "EvalResult",
    "FitResult",
    "FlowerRunResult",
    "HomeError",
    "HostError",
    "InstallError",
    "JobCancelled",
    "JobConfig",
    "JobFailed",
    "JobPaused",
    "ManifestRejected",
    "MissingExtra",
    "NotFound",
    "NotMeasurable",
    "OwnFault",
    "ParentLeft",
    "ParityError",
    "PartFailed",
    "PopulationConfig",
    "ProcessFailed",
    "ProcessLost",
    "ProtocolError",
    "QuorumNotMet",
    "RolloutFailed",
    "RoundReport",
    "RoundsConfig",
    "RunResult",
    "ServerConfig",
    "SignatureChanged",
    "SimulationConfig",
    "SimulationResult",
    "SplitConfig",
    "Spread",
    "StepFailed",
    "StopConfig",
    "SweepResult",
    "SweepWatching",
    "Task",
    "TaskError",
    "TiersConfig",
    "TrainConfig",
    "TrainerLost",
    "UpdateRejected",
    "UploadCutOff",
    "Variant",
    "VariantResult",
    "Watching",
    "WholeSet",
    "load_config",
    "run",
    "simulate",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgefl' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
