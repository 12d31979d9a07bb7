"""`key=value`, by hand."""

import pytest

from edgefl.errors import ConfigError
from edgefl.terminal.pairs import pair_of, pairs_of


def test_a_value_may_hold_anything() -> None:
    assert pair_of("--data", "path=/a b/c=d") == ("path", "/a b/c=d")
    assert pairs_of("--data", ["a=1", " b =", "a=2"]) == {"a": "2", "b": ""}


@pytest.mark.parametrize("text", ["", "a", "=1", "  =1"])
def test_what_is_no_pair_is_refused_by_option_and_form(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--set .* is not of the form section\.key=value"):
        pair_of("--set", text, "section.key=value")
