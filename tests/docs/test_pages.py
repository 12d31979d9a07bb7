"""What the pages say can be done as they say: commands, options, keys, extras, targets, links, code."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest

import edgefl
from edgefl.app.cli import cli
from edgefl.config import from_dict
from edgefl.simulation.world.settings import SimulationConfig
from tests.docs.pages import ROOT, Block, blocks, generated, others, shell_words, without_blocks, written

PAGES = {**written(), **generated()}
SHELL = list(blocks({**PAGES, **others()}, "sh"))
TOML = list(blocks(PAGES, "toml"))
PYTHON = list(blocks({**PAGES, **others()}, "python"))
SECTIONS = ("rounds", "train", "server", "aggregation", "tiers", "population", "engine")
KEY = re.compile(rf"`(?:--set )?((?:{'|'.join(SECTIONS)})(?:\.[a-z_]+)+)(?: ?= ?([^`]+))?`")
FLOWER_APPS = {"examples/flower-app", "examples/sklearn-app", "examples/keras-app"}


def parsed(words: list[str]) -> dict[str, Any]:
    """Return the options of one `edgefl` command by their names; raises click.UsageError for a wrong one."""
    command: click.Command = cli
    context = click.Context(cli, info_name="edgefl")
    while isinstance(command, click.Group):
        name, *words = words
        found = command.get_command(context, name)
        if found is None:
            raise click.UsageError(f"there is no command {context.command_path} {name}")
        command, context = found, click.Context(found, info_name=name, parent=context)
    options, rest, _ = command.make_parser(context).parse_args(words)
    if rest:
        raise click.UsageError(f"{context.command_path} does not take {rest}")
    return options


def of_edgefl(block: Block) -> list[list[str]]:
    found = []
    for words in shell_words(block):
        program, *arguments = words[1:] if words[:1] == ["sudo"] else words or [""]
        if Path(program).name == "edgefl":
            found.append(arguments)
    return found


@pytest.mark.parametrize("block", [one for one in SHELL if of_edgefl(one)], ids=str)
def test_each_command_is_accepted(block: Block) -> None:
    for words in of_edgefl(block):
        options = parsed(words)
        if options.get("task") not in FLOWER_APPS:
            for setting in (*(options.get("settings") or ()), *(options.get("sweep") or ())):
                assert_key(setting.partition("=")[0])
        if (config := options.get("config")) is not None:
            assert (ROOT / config).is_file(), config
        if str(options.get("task", "")).startswith("examples/"):
            assert (ROOT / options["task"]).is_dir(), options["task"]


def test_the_settings_are_found_in_a_command() -> None:
    """The names of parameters above are click's: a renamed one would be skipped."""
    options = parsed(["simulate", "examples/digits", "--set", "a.b=1", "--sweep", "a.c=1,2", "--config", "x.toml"])
    assert (options["settings"], options["sweep"], options["config"]) == (["a.b=1"], ["a.c=1,2"], "x.toml")
    assert options["task"] == "examples/digits"


@pytest.mark.parametrize(
    "wrong", ["simulate --clientz 3 x", "simulat x", "jobs", "run one two", "models publish m --gates f1"]
)
def test_a_wrong_command_is_found(wrong: str) -> None:
    with pytest.raises((click.UsageError, ValueError)):
        parsed(wrong.split())


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_each_extra_and_each_target_exists(block: Block) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    targets = {line.split(":")[0] for line in (ROOT / "Makefile").read_text("utf-8").splitlines()}
    for words in shell_words(block):
        if words[:1] == ["make"]:
            assert words[1] in targets, words
        if words[:2] == ["pip", "install"]:
            extras = re.fullmatch(r"\.\[([a-z,]+)\]", words[2])
            assert extras is not None, words
            assert set(extras[1].split(",")) <= project["optional-dependencies"].keys(), words


def assert_key(key: str) -> None:
    """Fail unless the configuration has this key; what is below a table of options is free."""
    assert from_here(key.split("."), SimulationConfig()), f"the configuration has no {key}"


def from_here(names: list[str], value: Any) -> bool:
    if not names or isinstance(value, dict):
        return True
    return hasattr(value, names[0]) and from_here(names[1:], getattr(value, names[0]))


@pytest.mark.parametrize("page", [*PAGES, *others()])
def test_each_key_that_is_mentioned_exists(page: str) -> None:
    for key, value in KEY.findall({**PAGES, **others()}[page]):
        assert_key(key)
        if value and " " not in value:
            config: dict[str, Any] = {}
            *sections, last = key.split(".")
            inside = config
            for section in sections:
                inside = inside.setdefault(section, {})
            try:
                inside[last] = tomllib.loads(f"value = {value}")["value"]
            except tomllib.TOMLDecodeError:
                inside[last] = value  # as on the command line
            from_dict(SimulationConfig, config)


def test_a_key_that_does_not_exist_is_found() -> None:
    assert_key("server.options.momentum")
    with pytest.raises(AssertionError, match=r"no train\.learning_rate"):
        assert_key("train.learning_rate")


@pytest.mark.parametrize("block", TOML, ids=str)
def test_each_configuration_can_be_read(block: Block) -> None:
    data = tomllib.loads(block.text)
    if "tool" in data:
        assert {"task"} <= data["tool"]["edgefl"].keys() <= {"task", "include"}
    else:
        from_dict(SimulationConfig, data)


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_each_piece_of_python_compiles_and_its_imports_exist(block: Block) -> None:
    compile(block.text, block.page, "exec")
    for line in re.findall(r"^(?:from edgefl[\w.]* import .+|import edgefl[\w.]*)$", block.text, re.MULTILINE):
        exec(line, {})  # noqa: S102 - our own documentation


@pytest.mark.soak  # it imports torch and torchmetrics
@pytest.mark.parametrize("block", [one for one in PYTHON if one.titled], ids=str)
def test_each_whole_file_runs(block: Block) -> None:
    names: dict[str, Any] = {}
    exec(block.text, names)  # noqa: S102 - our own documentation
    if "task" in names:
        result = edgefl.simulate(names["task"], clients=2, rounds=2, engine="loop")
        assert result.rounds[-1].admitted == 2
        assert result.final
    else:
        edgefl.Task(name="m", model=list, loss=max, train_data=list, metrics=names["metrics"])


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as MkDocs makes them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", without_blocks(text), re.MULTILINE):
        given = re.search(r"\{ #([\w-]+) \}$", heading)
        plain = re.sub(r"[^\w\s-]", "", heading.lower()).strip()
        found.add(given[1] if given else re.sub(r"[\s-]+", "-", plain))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_each_link_inside_the_documentation_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(PAGES[page])):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = str(Path(page).parent / path) if path else page
        if path.startswith("assets/"):
            assert (ROOT / "docs" / there).is_file(), f"{page} shows {target}"
            continue
        assert there in PAGES, f"{page} links to {target}"
        assert not anchor or anchor in anchors(PAGES[there]), f"{page} links to {target}"


@pytest.mark.parametrize("page", others())
def test_each_link_of_the_other_files_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(others()[page])):
        if not target.startswith("https://"):
            assert (ROOT / Path(page).parent / target.partition("#")[0]).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", {**written(), **others()})
def test_each_shell_command_is_in_a_marked_block(page: str) -> None:
    """A block without a language would escape these tests."""
    text = {**written(), **others()}[page]
    unmarked = [] if page == "design.md" else list(blocks({page: text}, "", "bash", "console", "shell"))
    assert [str(one) for one in unmarked] == []
    assert re.findall(r"^(?:    |\t)(?:\$ )?(?:sudo |pip |make |edgefl ).*", without_blocks(text), re.MULTILINE) == []
