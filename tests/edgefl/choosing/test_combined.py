"""Settings that exclude each other are refused in pairs, with the reason; each alone is accepted."""

from __future__ import annotations

from typing import Any

import pytest

from edgefl.choosing.combined import LATE_NEXT, LATE_REFUSE, check_combined
from edgefl.errors import ConfigError

PLAIN: dict[str, Any] = {
    "algorithm": "fedavg", "mode": "local", "region_rounds": 1, "fan_out": (), "late": LATE_REFUSE, "fragments": 1,
}  # fmt: skip
ALONE: list[dict[str, Any]] = [
    {}, {"algorithm": "fedsgd"}, {"region_rounds": 2}, {"fan_out": (2,)}, {"late": LATE_NEXT}, {"fragments": 2},
    {"mode": "split"},
    {"region_rounds": 2, "fan_out": (2,)}, {"fragments": 2, "fan_out": (2,)},
]  # fmt: skip


@pytest.mark.parametrize("changes", ALONE)
def test_what_goes_together_is_accepted(changes: dict[str, Any]) -> None:
    check_combined(**PLAIN | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"region_rounds": 2, "algorithm": "fedsgd"}, "tiers.region_rounds=2 needs train.algorithm=fedavg"),
        ({"late": LATE_NEXT, "algorithm": "fedsgd"}, "rounds.late='next' needs train.algorithm=fedavg"),
        ({"late": LATE_NEXT, "region_rounds": 2}, "rounds.late='next' needs tiers.region_rounds=1"),
        ({"late": LATE_NEXT, "fan_out": (2,)}, "rounds.late='next' and tiers.fan_out"),
        ({"fragments": 3, "algorithm": "fedsgd"}, "server.fragments=3 needs train.algorithm=fedavg"),
        ({"fragments": 3, "region_rounds": 2}, "server.fragments=3 needs tiers.region_rounds=1"),
        ({"fragments": 3, "late": LATE_NEXT}, "server.fragments=3 and rounds.late='next'"),
        ({"fragments": 3, "mode": "split"}, "server.fragments=3 and train.mode='split': the cloud's part changes"),
    ],
)
def test_what_excludes_each_other_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_combined(**PLAIN | changes)
