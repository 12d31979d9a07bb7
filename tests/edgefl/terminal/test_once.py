"""A reason is said once, and again only if it changes."""

from __future__ import annotations

from edgefl.terminal.once import Once


def test_a_reason_is_said_once_for_each_name() -> None:
    once = Once()
    assert once.text({"a": "no data", "b": "no data"}) == "a, b: no data"
    assert once.text({"a": "no data", "b": "no data"}) == ""
    assert once.text({"a": "no card", "c": "no data"}) == "a: no card; c: no data"


def test_what_is_said_is_short_and_on_one_line() -> None:
    text = Once().text({str(n): f"reason\n{n}" for n in range(9)}, 2)
    assert text == "0: reason 0; 1: reason 1; and 7 more"
