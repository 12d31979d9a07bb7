"""The cloud's parts of a round are averaged by hand-checked numbers, and only those of admitted devices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cloud.split.fold import folded
from cloud.split.results import SplitFolder, write_durably
from edgefl.config import JobConfig
from edgefl.errors import StepFailed
from edgefl.protocols.messages import Division
from edgefl.records import RoundOutcome
from edgefl.settings.server import ServerConfig
from tests.cloud.split.bench import settings

BEFORE = {
    "w": np.zeros(1, np.float32),
    "tied": np.zeros(1, np.float32),
    "n": np.array(4),
    "frozen": np.ones(1, np.float32),
}
DIVISION = Division(in_cloud={"w": "w", "tied": "w", "n": "n"}, buffers=["n"])


def outcome(*admitted: str) -> RoundOutcome:
    return RoundOutcome(
        job="job-1",
        round=2,
        parameters={},
        admitted=admitted,
        rejected={},
        failed={},
        missing=(),
        weight=8.0,
        metrics={},
        seconds=1.0,
        up_bytes=0,
        down_bytes=0,
    )


def written(tmp_path: Path, **results: tuple[float, int, int]) -> SplitFolder:
    folder = SplitFolder(tmp_path, "job-1")
    for device, (w, n, samples) in results.items():
        folder.write_result(2, device, {"w": np.full(1, w, np.float32), "n": np.array(n)}, samples)
    return folder


def test_the_mean_by_hand_counts_samples_and_admitted_devices_alone(tmp_path: Path) -> None:
    folder = written(tmp_path, a=(2.0, 8, 1), b=(4.0, 4, 3), c=(100.0, 0, 50))
    new = folded(folder, JobConfig(train=settings()), DIVISION, BEFORE, outcome("a", "b"))
    assert new["w"].tolist() == [3.5]  # (1 * 2 + 3 * 4) / 4
    assert new["tied"].tolist() == [3.5]
    assert int(new["n"]) == 5  # (1 * 8 + 3 * 4) / 4
    assert new["frozen"].tolist() == [1.0]
    assert list(new) == list(BEFORE)
    half = JobConfig(train=settings(), server=ServerConfig(lr=0.5))
    assert folded(folder, half, DIVISION, BEFORE, outcome("a", "b"))["w"].tolist() == [1.75]


def test_parts_that_are_missing_or_broken_do_not_count(tmp_path: Path) -> None:
    folder = written(tmp_path, a=(2.0, 4, 1), b=(float("nan"), 4, 3))
    folder.write_result(2, "c", {"w": np.ones(5, np.float32), "n": np.array(1)}, 3)
    new = folded(folder, JobConfig(train=settings()), DIVISION, BEFORE, outcome("a", "b", "c", "d"))
    assert new["w"].tolist() == [2.0]
    with pytest.raises(StepFailed, match="none of the 3 admitted devices has finished its part in the cloud"):
        folded(folder, JobConfig(train=settings()), DIVISION, BEFORE, outcome("b", "c", "d"))


def test_a_shared_part_is_taken_as_it_is(tmp_path: Path) -> None:
    folder, config = SplitFolder(tmp_path, "job-1"), JobConfig(train=settings({"cloud_part": "shared"}))
    with pytest.raises(StepFailed, match="no device has trained the shared part"):
        folded(folder, config, DIVISION, BEFORE, outcome("a"))
    folder.path.mkdir(parents=True)
    write_durably({"w": np.full(1, 9, np.float32), "n": np.array(6), "optimizer/0/step": np.ones(1)}, folder.shared)
    new = folded(folder, config, DIVISION, BEFORE, outcome("a"))
    assert (new["w"].tolist(), new["tied"].tolist(), int(new["n"])) == ([9.0], [9.0], 6)
    write_durably({"w": np.full(1, np.inf, np.float32), "n": np.array(6)}, folder.shared)
    with pytest.raises(StepFailed, match="is not usable"):
        folded(folder, config, DIVISION, BEFORE, outcome("a"))
