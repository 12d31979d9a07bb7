"""Text from elsewhere: by hand, by law (safe, and left alone once it is), by enemy (every character there is)."""

from __future__ import annotations

import json
import random
import sys
import unicodedata

import pytest

from edgefl.terminal.text import for_json, grouped, is_safe, lines, one_line

EVERY = [chr(code) for code in range(sys.maxunicode + 1)]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cam-3", "cam-3"),
        ("süß 木 🙂 [red]", "süß 木 🙂 [red]"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("first\nsecond\r\n  third\tend\n", "first second third end"),
        ("nul\0 del\x7f c1\x9b", "nul\\x00 del\\x7f c1\\x9b"),
        ("line\u2028sep \u202eturned", "line sep \\u202eturned"),
        ("lone \ud800", "lone \\ud800"),
        ("", ""),
    ],
)
def test_one_line_by_hand(text: str, shown: str) -> None:
    assert one_line(text) == shown
    assert is_safe(shown)


def test_long_text_is_cut_and_says_so() -> None:
    assert one_line("x" * 10, 10) == "x" * 10
    assert one_line("x" * 11, 10) == "x" * 7 + "..."
    assert one_line("\x1b" * 1000, 10) == "\\x1b\\x1..."


def test_lines_keep_their_ends_and_nothing_else() -> None:
    assert lines("a\r\n\tb\x1b[0m\rc") == "a\n\tb\\x1b[0m\\x0dc"


def test_no_character_that_moves_a_cursor_is_safe() -> None:
    controls = [one for one in EVERY if unicodedata.category(one) in {"Cc", "Cs", "Zl", "Zp"}]
    assert [one for one in controls if is_safe(one)] == []
    assert is_safe("".join(one for one in EVERY if unicodedata.category(one)[0] in "LNPS"))


def test_a_line_is_left_as_it_is_once_it_is_one() -> None:
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(draw.choices(EVERY, k=40)) + "".join(draw.choices("\x1b\n\r\ud800\x9b ab", k=40))
        shown = one_line(text, 60)
        assert is_safe(shown)
        assert len(shown) <= 60
        assert one_line(shown, 60) == shown
        shown.encode()


def test_json_is_strict_and_clean_at_every_depth() -> None:
    value = {"a\x1b": ["b\n", {"c": float("nan")}, ("\ud800", 1, True, None, 1.5)], "d": float("-inf")}
    clean = for_json(value)
    assert clean == {"a\\x1b": ["b", {"c": None}, ["\\ud800", 1, True, None, 1.5]], "d": None}
    assert json.loads(json.dumps(clean, allow_nan=False, ensure_ascii=False).encode()) == clean


def test_a_reason_is_told_once_with_the_names_that_have_it():
    reasons = {"a": "no data", "b": "late", "c": "no data"}
    assert grouped(reasons) == "a, c: no data; b: late"
    assert grouped(dict.fromkeys("abcd", "late")) == "a, b, c, d: late"
    assert grouped(dict.fromkeys("abcde", "late")) == "a, b, c and 2 more: late"
    assert grouped({str(n): f"reason {n}" for n in range(9)}, 2) == "0: reason 0; 1: reason 1; and 7 more"
    assert grouped({}) == ""
