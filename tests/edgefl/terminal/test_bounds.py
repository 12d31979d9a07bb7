"""Each bound refuses what is outside with the key, the value and what was expected."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from edgefl.errors import ConfigError
from edgefl.terminal.bounds import (
    MAX_NAME_CHARS,
    MAX_RATE,
    require,
    require_above_zero,
    require_plain,
    require_printable,
    require_within,
)


def test_what_is_within_passes() -> None:
    require(True, "never")
    for value in (0, 1, 0.5):
        require_within("a.b", value, 0, 1)
    require_above_zero("a.b", 1e-300, 1)
    require_printable("a.b", "name")
    for value in (True, None, "text", 1, -MAX_RATE, [0.5, [1, "a"]]):
        require_plain("a.b", value)


@pytest.mark.parametrize(
    ("refuse", "said"),
    [
        (lambda: require(False, "a.b=2 is above a.c=1"), "a.b=2 is above a.c=1"),
        (lambda: require_within("a.b", 2, 0, 1), "a.b=2 must be 0 or more, and at most 1"),
        (lambda: require_within("a.b", math.nan, 0, 1), "a.b=nan must be 0 or more"),
        (lambda: require_above_zero("a.b", 0.0, 1), "a.b=0.0 must be above 0, and at most 1"),
        (lambda: require_above_zero("a.b", math.nan, 1), "a.b=nan must be above 0"),
        (lambda: require_printable("a.b", "x\n"), "must be printable"),
        (lambda: require_printable("a.b", "x" * (MAX_NAME_CHARS + 1)), f"at most {MAX_NAME_CHARS} characters"),
        (lambda: require_plain("a.b", [1, math.inf]), "a.b=inf must be a number from"),
        (lambda: require_plain("a.b", {"x": 1}), "must be a number from"),
    ],
)
def test_what_is_outside_is_refused(refuse: Callable[[], None], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        refuse()
