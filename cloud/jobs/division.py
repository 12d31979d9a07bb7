"""Jobs in parts: what the cloud trains itself, and what devices have beside the tensors that they send."""

from __future__ import annotations

from typing import Any

from edgefl.choosing.combined import LATE_REFUSE
from edgefl.config import JobConfig
from edgefl.errors import ConfigError
from edgefl.protocols.messages import BlobRef, Division, from_json
from edgefl.settings.split import SHARED, SPLIT
from edgefl.trees import Tree


def check_division(config: JobConfig, division: Division | None, frozen: Tree | None) -> None:
    """Raise ConfigError for a job in parts that could only fail; `frozen` are the tensors that devices do not send."""
    if (config.train.mode == SPLIT) != (division is not None):
        raise ConfigError(
            f"train.mode={config.train.mode!r}, but the job has {'no' if division is None else 'a'} division of its "
            "tensors between device and cloud; submit it with `edgefl run` of this version"
        )
    if division is None:
        return
    config.train.split.require_complete()
    if frozen is None or not division.in_cloud or not {*division.in_cloud, *division.in_cloud.values()} <= {*frozen}:
        raise ConfigError("the job's division names tensors in the cloud that are not among those that it has there")
    if fault := _unsuitable(config):
        raise ConfigError(f"train.mode='split' cannot have {fault}. Leave it out")


def _unsuitable(config: JobConfig) -> str:
    server = config.server
    if config.rounds.late != LATE_REFUSE:
        return f"rounds.late={config.rounds.late!r}: the cloud's part is of its own round"
    if config.tiers.region_rounds > 1:
        return f"tiers.region_rounds={config.tiers.region_rounds}: the cloud's part is averaged with each round"
    if (server.optimizer != "SGD" or server.options) and config.train.split.cloud_part != SHARED:
        return f"server.optimizer={server.optimizer!r}: the cloud's part is averaged by plain SGD"
    return ""


def division_of(row: Any) -> Division | None:
    """Return what a job in parts trains in the cloud; None if devices train all."""
    return None if row["division"] is None else from_json(Division, row["division"])


def on_devices(frozen: BlobRef | None, division: Division | None) -> BlobRef | None:
    """Return the blob of the frozen tensors that devices need."""
    return frozen if division is None else division.device_frozen


def frozen_values(frozen: BlobRef | None) -> dict[str, Any]:
    """Return the columns of a new blob of the tensors that devices do not send; none without one."""
    return {} if frozen is None else {"frozen_sha256": frozen.sha256, "frozen_size": frozen.size}
