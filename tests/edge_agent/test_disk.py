"""A disk that is too small is said beforehand; one that fills up on the way leaves nothing half done."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from edge_agent.disk import KEPT_BYTES, require_space, space_for
from edgefl.errors import DiskFull


def free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def test_what_fits_is_not_refused(tmp_path: Path) -> None:
    require_space(tmp_path, 1, "the model")


def test_what_does_not_fit_is_named_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match=rf"the model needs \d+\.\d MB of disk space; {tmp_path} has .* left.*Free some"):
        require_space(tmp_path, free(tmp_path), "the model")


def test_what_is_kept_for_the_agent_is_not_given_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_agent.disk.KEPT_BYTES", free(tmp_path) + (1 << 30))
    with pytest.raises(DiskFull):
        require_space(tmp_path, 0, "nothing")
    assert KEPT_BYTES == 2 << 20


def test_what_is_there_already_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = tmp_path / "blob.part"
    part.write_bytes(b"x" * 100)
    monkeypatch.setattr("edge_agent.disk.require_space", lambda _folder, size, _what: sizes.append(size))
    sizes: list[int] = []
    with space_for(part, 150, "a blob"):
        pass
    assert sizes == [50]


def fail_half_way(part: Path, code: int) -> None:
    with space_for(part, 10, "a blob"):
        part.write_bytes(b"half")
        raise OSError(code, "what the system says")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_on_the_way_gets_its_room_back(tmp_path: Path, code: int) -> None:
    with pytest.raises(DiskFull, match=r"a blob: the disk of .* ran full"):
        fail_half_way(tmp_path / "blob.part", code)
    assert not list(tmp_path.iterdir())


def test_other_errors_keep_what_came(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="what the system says"):
        fail_half_way(tmp_path / "blob.part", errno.EIO)
    assert (tmp_path / "blob.part").read_bytes() == b"half"


def test_what_was_begun_of_something_too_large_is_removed(tmp_path: Path) -> None:
    part = tmp_path / "blob.part"
    part.write_bytes(b"half")
    with pytest.raises(DiskFull), space_for(part, free(tmp_path) * 2, "a blob"):
        pytest.fail("it began")
    assert not part.exists()
