"""The files of a job in parts: complete, by round, and deleted with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cloud.split.results import SplitFolder, file_name, folders_of_others


def test_results_by_round_and_device(tmp_path: Path) -> None:
    folder = SplitFolder(tmp_path, "job-1")
    name = "../cam 1"
    folder.write_result(3, name, {"w": np.ones(2, np.float32)}, 48)
    found = folder.result(3, name)
    assert found is not None
    assert found[0]["w"].tolist() == [1.0, 1.0]
    assert list(found[0]) == ["w"]
    assert found[1] == 48
    assert folder.result(2, name) is None
    assert folder.result(3, "cam 2") is None
    assert "/" not in file_name(name)


def test_old_rounds_and_other_jobs_are_deleted(tmp_path: Path) -> None:
    folder = SplitFolder(tmp_path, "job-1")
    for number in (1, 2, 3):
        folder.write_result(number, "a", {}, 1)
        (folder.kept / str(number)).mkdir(parents=True)
    folder.forget_rounds(3)
    assert folder.result(2, "a") is None
    assert folder.result(3, "a") is not None
    assert [one.name for one in folder.kept.iterdir()] == ["3"]
    assert folders_of_others(tmp_path, ["job-1"]) == []
    [other] = folders_of_others(tmp_path, ["job-2"])
    other.remove()
    assert not folder.path.exists()
    other.remove()
