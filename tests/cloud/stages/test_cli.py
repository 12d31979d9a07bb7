"""`edgefl cloud stages`, as it is typed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from cloud.cli import cloud
from cloud.stages.cli import options_of, parse_cores, stages
from edgefl.errors import ConfigError, HomeError


def test_its_options_are_those_of_the_server() -> None:
    context = stages.make_context("stages", [
        "m.onnx", "--home", "/home", "--cuts", "a, split:c", "--tail-from", "x", "--max-wait-ms", "2",
        "--max-batch", "8",
    ])  # fmt: skip
    options = options_of(**context.params)
    assert options.cuts == ("a", "split:c")
    assert options.tail_from == ("x",)
    assert (options.limits.rule.max_rows, options.limits.rule.max_wait_s) == (8, 0.002)
    assert (options.home, options.model, options.port) == (Path("/home"), "m.onnx", 9450)


def test_cores_as_they_are_typed(monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert parse_cores("0-3,6") == (0, 1, 2, 3, 6)
    assert parse_cores("5") == (5,)
    for text, words in (("a", "'a' is invalid"), ("0-", "'0-' is invalid"), ("7-8", r"may use the cores \[0, 1, 2"),
                        ("3-1", "may use the cores"), ("", "'' is invalid")):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            parse_cores(text)


def test_what_cannot_start(tmp_path) -> None:
    for arguments, kind, words in (
        (["--home", str(tmp_path / "none")], HomeError, "no home.json"),
        (["--home", str(tmp_path), "--insecure", "--host", "10.0.0.1"], ConfigError, "--insecure is for loopback only"),
    ):
        done = CliRunner().invoke(cloud, ["stages", "m.onnx", *arguments])
        assert isinstance(done.exception, kind)
        assert words in str(done.exception)
