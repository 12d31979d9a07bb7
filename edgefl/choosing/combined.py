"""Settings of a job that exclude each other, each pair refused with the reason."""

from __future__ import annotations

from collections.abc import Sequence

from edgefl.settings.split import SPLIT
from edgefl.terminal.bounds import require

LATE_REFUSE, LATE_NEXT = "refuse", "next"
_FEDAVG = "fedavg"


def check_combined(
    *, algorithm: str, mode: str, region_rounds: int, fan_out: Sequence[int], late: str, fragments: int
) -> None:
    """Raise ConfigError for settings that cannot be used together."""
    require(
        region_rounds == 1 or algorithm == _FEDAVG,
        f"tiers.region_rounds={region_rounds} needs train.algorithm=fedavg: a gradient is not a change",
    )
    if late == LATE_NEXT:
        said = f"rounds.late={late!r}"
        require(algorithm == _FEDAVG, f"{said} needs train.algorithm=fedavg: a gradient is of its own version alone")
        require(region_rounds == 1, f"{said} needs tiers.region_rounds=1: a region sends what it has")
        require(not fan_out, f"{said} and tiers.fan_out: updates below a region cannot be late. Leave one out")
    if fragments > 1:
        said = f"server.fragments={fragments}"
        require(algorithm == _FEDAVG, f"{said} needs train.algorithm=fedavg: a gradient is not a change over rounds")
        require(region_rounds == 1, f"{said} needs tiers.region_rounds=1: a regional round changes the whole model")
        require(late != LATE_NEXT, f"{said} and rounds.late={late!r}: the next round takes another fragment")
        require(
            mode != SPLIT, f"{said} and train.mode={mode!r}: the cloud's part changes in every round. Leave one out"
        )
