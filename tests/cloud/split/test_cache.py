"""Kept activations: each once, torn records cut away, quotas, and rows that are none."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from cloud.split.cache import CacheQuota, DeviceRows, QuotaExceeded, parse_row, rows_in
from edgefl.errors import ProtocolError
from edgefl.offload import wire


def row(value: float, target: int = 1) -> bytes:
    parts = (
        wire.encode({"h": np.full((1, 4), value, np.float32)}, "fp16"),
        wire.encode({"target.0": np.array([target])}, "fp32"),
    )
    return b"".join(struct.pack("<I", len(one)) + one for one in parts)


def key(number: int) -> bytes:
    return bytes([number]) * 16


def rows(path: Path, quota: CacheQuota | None = None) -> DeviceRows:
    return DeviceRows(path, "cam-1", quota or CacheQuota(10_000, 10_000))


def test_rows_come_back_also_after_a_kill_within_a_record(tmp_path: Path) -> None:
    here = rows(tmp_path / "rows")
    for number in range(3):
        here.add(key(number), memoryview(row(number, number)))
    here.add(key(1), memoryview(row(9)))  # it is there already
    size = here.held_bytes
    here.close()
    with (tmp_path / "rows").open("ab") as file:
        file.write(key(4) + struct.pack("<I", 500) + b"torn")
    again = rows(tmp_path / "rows")
    assert again.held_bytes == size
    values, targets = again.row(key(1))
    assert values["h"].tolist() == [[1.0] * 4]
    assert targets["target.0"].tolist() == [1]
    keys = np.frombuffer(b"".join(key(n) for n in (2, 4, 0, 7)), np.uint8).reshape(-1, 16)
    assert again.lacks(keys) == [1, 3]
    with pytest.raises(ProtocolError, match="were not sent"):
        again.row(key(4))


def test_quotas_of_a_device_and_of_all(tmp_path: Path) -> None:
    size = len(row(0)) + 20
    quota = CacheQuota(2 * size, 3 * size)
    one, other = rows(tmp_path / "one", quota), rows(tmp_path / "other", quota)
    one.add(key(0), memoryview(row(0)))
    one.add(key(1), memoryview(row(0)))
    with pytest.raises(QuotaExceeded, match=f"device cam-1 would have {3 * size} bytes"):
        one.add(key(2), memoryview(row(0)))
    other.add(key(0), memoryview(row(0)))
    with pytest.raises(QuotaExceeded, match=f"has {3 * size} of {3 * size} bytes"):
        other.add(key(1), memoryview(row(0)))
    one.close()
    other.add(key(1), memoryview(row(0)))


def test_rows_that_are_none_are_refused() -> None:
    assert [bytes(one) for one in rows_in(memoryview(row(1) + row(2)))] == [row(1), row(2)]
    for bad in (b"\x01", struct.pack("<I", 9) + b"1", row(1)[:-1]):
        with pytest.raises(ProtocolError):
            list(rows_in(memoryview(bad)))
        with pytest.raises(ProtocolError):
            parse_row(memoryview(bad))
    infinite = wire.encode({"h": np.full((1, 1), np.inf, np.float32)}, "fp32")
    with pytest.raises(ProtocolError, match="is not finite"):
        parse_row(memoryview(struct.pack("<I", len(infinite)) + infinite + row(1)))
