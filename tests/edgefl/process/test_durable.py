"""Files and folders are flushed; what is not there is an error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgefl.process import durable


def test_a_file_and_a_folder_are_flushed_and_nothing_stays_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, seen, fsync = tmp_path / "file", [], os.fsync
    file.write_bytes(b"bytes")

    def flushed(descriptor: int) -> None:
        seen.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(durable.os, "fsync", flushed)
    before = len(list(Path("/dev/fd").iterdir()))
    durable.flush(file)
    durable.flush(tmp_path)
    assert seen == [file.stat().st_ino, tmp_path.stat().st_ino]
    assert len(list(Path("/dev/fd").iterdir())) == before
    with pytest.raises(FileNotFoundError):
        durable.flush(tmp_path / "gone")
