"""The picture of a fleet: it is written, and an unknown format is refused."""

from __future__ import annotations

import pytest

from edgefl.errors import ConfigError
from edgefl.operator.tree import add_job
from edgefl.simulation.screen.tree_plot import write_tree_plot
from tests.edgefl.operator.test_tree import JOB, tree


def test_the_picture_names_every_node(tmp_path):
    root = tree()
    add_job(root, JOB)
    write_tree_plot(root, tmp_path / "fleet.svg")
    svg = (tmp_path / "fleet.svg").read_text("utf-8")
    assert all(f"<!-- {name}" in svg for name in ("cloud", "norway", "oslo", "rome", "cam-1", "cam-2", "cam-4"))
    assert "2 refused or failed" in svg


def test_a_format_that_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--plot"):
        write_tree_plot(tree(), tmp_path / "fleet.xyz")
