"""Notes of regional rounds: kept through a kill, atomic, and gone when they are dropped."""

from __future__ import annotations

from cloud.region.server.regional_notes import Reached, RegionalNotes


def test_a_note_is_found_again_and_dropped(tmp_path):
    notes, key = RegionalNotes(tmp_path), ("job-1-x", 3)
    assert notes.get(key) is None
    first = Reached(first="aa", regional=1, region_rounds=3, models=["bb"])
    last = Reached(first="aa", regional=2, region_rounds=3, models=["bb", "cc"])
    for one in (first, last):
        notes.put(key, one)
        assert RegionalNotes(tmp_path).get(key) == one
    assert [*notes.noted()] == [key]
    assert last.numbers(3) == [7, 8, 9]
    notes.drop(key)
    notes.drop(key)
    assert ([*notes.noted()], notes.get(key), [*tmp_path.iterdir()]) == ([], None, [])
