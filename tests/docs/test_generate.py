"""The generated pages say all there is: each key with its comment, each command, each public name."""

from __future__ import annotations

import click
import pytest

import edgefl
from docs.generate import api, commands, configuration
from docs.generate.comments import comments_in, field_comments
from docs.generate.markdown import prose, table
from edgefl.app.cli import cli
from edgefl.config import RoundsConfig
from edgefl.simulation.world.draws import Spread
from edgefl.simulation.world.settings import SimulationConfig

SECTIONS = dict(configuration.sections(SimulationConfig))


def test_the_sections_by_hand() -> None:
    assert list(SECTIONS) == [
        "rounds", "rounds.stop", "train", "train.split", "server", "aggregation", "tiers", "population",
        "population.devices", "population.devices.availability", "engine",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [*SECTIONS.values(), Spread], ids=lambda kind: kind.__name__)
def test_each_key_has_a_comment_that_says_what_it_is(kind: type) -> None:
    assert [name for name, _, _, comment in configuration.keys(kind) if not comment] == []


def test_a_row_of_the_configuration_by_hand() -> None:
    page = configuration.page()
    assert "| `quorum` | integer | `1` | with fewer admitted updates than this, the job fails |" in page
    assert "### `[population.devices]` { #population-devices }" in page
    assert "| `speed` | [distribution](#distributions) | `{ mean = 1000.0 }` |" in page
    assert page.index("## Sections of a job") < page.index("`[aggregation]`") < page.index("## Sections of a simula")


def test_each_command_and_each_of_its_options_is_on_the_page() -> None:
    page = commands.page()
    found = list(commands.leaves(cli, click.Context(cli, info_name="edgefl")))
    assert len(found) > 20
    for command, context in found:
        assert f"{context.command_path} [OPTIONS]" in page
        for one in command.params:
            assert all(option in page for option in one.opts if option.startswith("--"))
    assert "```sh\nedgefl new wine\nedgefl new camera --kind image\n```\n\nKinds:\n\n```text\nimage " in page


def test_each_public_name_is_on_the_page_and_the_ungrouped_ones_are_errors() -> None:
    page = api.page()
    assert all(f"::: edgefl.{name}\n" in page or f"::: edgefl.flower.{name}\n" in page for name in edgefl.__all__)
    assert all(issubclass(getattr(edgefl, name), edgefl.EdgeflError) for name in api.errors())
    assert "|-- ConfigError" in page


def test_comments_by_hand() -> None:
    source = 'class A:\n    a: int = 1  # one\n    b: str = "# no"\n    c: tuple = (\n        1,\n    )  # three\n'
    assert comments_in(source) == {"a": "one", "c": "three"}
    assert field_comments(RoundsConfig)["clients"] == "updates to collect per round; 0 = from every client"
    with pytest.raises(TypeError, match="expected the source of a class"):
        comments_in("def f(): ...\n")


def test_text_cannot_break_a_page() -> None:
    assert prose("1<=x, `a < b`, *") == r"1&lt;=x, `a < b`, \*"
    assert prose("a round. [default: last] [x>=1]") == r"a round. [default: last] \[x>=1]"  # would be a link
    assert table(("a",), [("x|y `a|b`",)]) == "| a |\n| --- |\n| x\\|y `a|b` |"
