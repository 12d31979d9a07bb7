"""What is kept of a training: the two latest states, complete or not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgefl.offload.training.checkpoints import PartCheckpoints


def test_the_two_latest_are_kept(tmp_path: Path) -> None:
    kept = PartCheckpoints(tmp_path / "kept" / "round")
    for step in (20, 100, 40):
        kept.keep(step, {"w": np.full(2, step, np.float32)})
    assert kept.steps() == [40, 100]
    assert kept.load(40)["w"].tolist() == [40.0, 40.0]
    kept.forget([40])
    assert PartCheckpoints(tmp_path / "kept" / "round").steps() == [100]
    kept.forget()
    assert kept.steps() == []


def test_another_round_deletes_what_is_left_and_a_torn_file_does_not_count(tmp_path: Path) -> None:
    old = PartCheckpoints(tmp_path / "one")
    old.keep(5, {})
    (tmp_path / "two.7.part").write_bytes(b"torn")
    (tmp_path / "two.9").write_bytes(b"")
    new = PartCheckpoints(tmp_path / "two", is_only=True)
    assert old.steps() == []
    assert new.steps() == [9]
    assert not (tmp_path / "two.7.part").exists()
