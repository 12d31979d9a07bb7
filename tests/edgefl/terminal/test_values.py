"""Values in messages."""

from __future__ import annotations

import pytest

from edgefl.terminal.values import shown_value


@pytest.mark.parametrize(
    ("value", "text"), [(1.5, "1.5"), ("a", "'a'"), (1 << 300, "an integer of 301 bits"), ("\ud800", "'\\ud800'")]
)
def test_values_are_shown(value, text):
    assert shown_value(value) == text
