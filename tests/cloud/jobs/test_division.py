"""Jobs in parts: a division that fits the settings, or a refusal with the reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cloud.jobs.division import check_division, division_of, frozen_values, on_devices
from edgefl.config import JobConfig, RoundsConfig
from edgefl.errors import ConfigError
from edgefl.protocols.fields import to_json
from edgefl.protocols.messages import BlobRef, Division
from edgefl.settings.server import ServerConfig, TiersConfig
from tests.cloud.split.bench import settings

REF = BlobRef(sha256="0" * 64, size=3)
DIVISION = Division(in_cloud={"w": "w"}, buffers=[], device_frozen=REF)
FROZEN = {"w": np.ones(1, np.float32)}


def test_a_division_is_stored_and_says_what_devices_need() -> None:
    assert division_of({"division": to_json(DIVISION)}) == DIVISION
    assert division_of({"division": None}) is None
    other = BlobRef(sha256="1" * 64, size=4)
    assert on_devices(other, DIVISION) == REF
    assert on_devices(other, None) == other
    assert frozen_values(other) == {"frozen_sha256": "1" * 64, "frozen_size": 4}
    assert frozen_values(None) == {}
    check_division(JobConfig(train=settings()), DIVISION, FROZEN)
    check_division(JobConfig(), None, None)


@pytest.mark.parametrize(
    ("config", "division", "reason"),
    [
        ({}, DIVISION, "train.mode='local', but the job has a division"),
        ({"train": settings()}, None, "train.mode='split', but the job has no division"),
        ({"train": settings()}, Division(in_cloud={"v": "v"}, buffers=[]), "not among those that it has there"),
        ({"train": settings()}, Division(in_cloud={}, buffers=[]), "not among those that it has there"),
        ({"train": settings(), "rounds": RoundsConfig(late="next")}, DIVISION, "cannot have rounds.late='next'"),
        ({"train": settings(), "tiers": TiersConfig(region_rounds=2)}, DIVISION, "cannot have tiers.region_rounds=2"),
        (
            {"train": settings(), "server": ServerConfig(optimizer="Adam")},
            DIVISION,
            "cannot have server.optimizer='Adam'",
        ),
    ],
)
def test_what_could_only_fail_is_refused(config: dict[str, Any], division: Division | None, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_division(JobConfig(**config), division, FROZEN)
