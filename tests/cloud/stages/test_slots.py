"""The memory that the server shares with the stages."""

from __future__ import annotations

import os

import numpy as np
import pytest

from cloud.stages.slots import ALIGNMENT, KEPT_BYTES, Placed, SharedMemory, SlotFull, Slots


@pytest.fixture
def slots():
    one = Slots(2, 8 << 20)
    yield one
    one.close()


def pages(slots) -> int:
    """Return the memory that the file has, in bytes."""
    return os.fstat(slots.descriptor).st_blocks * 512


def test_another_process_s_view_shows_merged_rows(slots) -> None:
    begin, end = slots.take()
    placed, free = slots.write([np.arange(6.0).reshape(2, 3), np.arange(6.0, 9.0).reshape(1, 3)], begin, end)
    assert placed == Placed("FP64", (3, 3), begin)
    assert free == begin + 128  # 72 bytes, aligned
    assert free % ALIGNMENT == 0
    other = SharedMemory(os.dup(slots.descriptor), slots.num_bytes)
    assert other.read(placed).tolist() == np.arange(9.0).reshape(3, 3).tolist()
    assert other.bytes_at(begin + 8, 8) == np.float64(1).tobytes()


@pytest.mark.parametrize("array", [np.zeros((0, 4), np.float32), np.array(3, np.int64), np.array([True, False])])
def test_any_shape_can_be_written(slots, array) -> None:
    begin, end = slots.take()
    placed, _ = slots.write([array], begin, end)
    assert slots.read(placed).tolist() == array.tolist()
    assert slots.read(placed).shape == array.shape


def test_an_array_that_is_not_contiguous_is_written_in_its_order(slots) -> None:
    begin, end = slots.take()
    array = np.arange(12).reshape(3, 4)[:, ::2]
    placed, _ = slots.write([array], begin, end)
    assert slots.read(placed).tolist() == array.tolist()


def test_nothing_is_written_over_the_end(slots) -> None:
    _, end = slots.take()
    with pytest.raises(SlotFull, match="a tensor has 16 bytes, and 8 are free for a batch"):
        slots.write([np.zeros(2), np.zeros(0)], end - 8, end)
    assert slots.num_free == 1


def test_memory_of_free_slots_is_returned(slots) -> None:
    begin, end = slots.take()
    _, free = slots.write([np.ones(6 << 20, np.uint8)], begin, end)
    assert pages(slots) >= 6 << 20
    slots.trim()
    assert pages(slots) >= 6 << 20  # it is in use
    slots.give_back(begin, free)
    slots.trim()
    assert pages(slots) <= KEPT_BYTES
    assert slots.take() == (begin, end)  # the last used one is the next
