"""The page "What models work" is complete, is only written by its measurement, and its numbers cannot be wrong ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgefl.errors import ConfigError
from tests.kinds.compared import refusal, same
from tests.kinds.kinds import KINDS
from tests.kinds.page import COLUMNS, NOTHING, PAGE, YES, read, written


def test_the_page_has_each_kind_and_is_as_it_was_written() -> None:
    page = PAGE.read_text("utf-8")
    rows = read(page)
    assert list(rows) == [kind.title for kind in KINDS]
    assert written(rows) == page


def test_no_refusal_is_a_traceback() -> None:
    for row in read(PAGE.read_text("utf-8")).values():
        assert not [cell for cell in row.values() if "Traceback" in cell or cell == ""]


def test_a_page_by_hand() -> None:
    yes = dict.fromkeys(COLUMNS, YES)
    rows = {"a": yes, "b": {**yes, COLUMNS[1]: "no, it has | its own fit"}, "c": {**yes, COLUMNS[-1]: NOTHING}}
    rows["d"] = rows["b"]
    page = written(rows)
    assert "| b | yes | [1](#refusals) | yes | yes | yes | yes | yes | yes | yes |" in page
    assert page.endswith("\n## Refusals\n\n1. `no, it has | its own fit`\n")
    assert read(page) == rows
    assert read(page.replace(f" {COLUMNS[-1]} |", " serve by carrier pigeon |"))["a"] == {
        **yes, COLUMNS[-1]: NOTHING, "serve by carrier pigeon": YES
    }  # fmt: skip
    assert written({"a": yes}).endswith("There are none.\n")


def test_a_refusal_has_no_paths_and_no_sizes_in_bytes() -> None:
    said = ConfigError("/home/x/m.onnx: `int8` has 120 bytes,\n not fewer than the 99")
    assert refusal(said, Path("/home/x")) == "m.onnx: 'int8' has N bytes, not fewer than the N"


@pytest.mark.parametrize(
    "seen", [{"a": np.array([1.0, np.nan])}, {"a": np.ones(1)}, {"a": np.array([1, 1.1])}, {"b": np.ones(2)}, {}]
)
def test_a_wrong_number_is_seen(seen) -> None:
    same({"a": np.array([1, 1.01])}, {"a": np.ones(2)}, 0.02, "close")
    with pytest.raises(AssertionError, match="of it"):
        same(seen, {"a": np.ones(2)}, 0.02, "one of it")
