"""Every command of every page is run, in order, with real processes; what cannot be run says why, in its fence."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import generation_model
from tests import language_models
from tests.docs.page_runner import SHORTER, PageRunner
from tests.docs.pages import blocks, is_run, lines_of, others, written
from tests.docs.scenes import BEFORE, FILES, commands_before, files_of

PAGES = {**written(), **others()}
SHELL = {page: found for page in PAGES if (found := list(blocks({page: PAGES[page]}, "sh")))}
RUN = {page: [line for one in found for line in lines_of(one) if is_run(one, line)] for page, found in SHELL.items()}


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("page", [page for page, lines in RUN.items() if lines])
def test_each_command_of_a_page_does_what_it_says(page: str, tmp_path: Path) -> None:
    if page == "examples/keras-app/README.md":
        pytest.importorskip("keras", reason="`make soak` installs TensorFlow")
    if page == "examples/chat/README.md":
        pytest.importorskip("openai", reason="the client of OpenAI's API is not installed")
        language_models.smollm2(generation_model.model_file)
    runner = PageRunner(tmp_path)
    for name, text in (*files_of(page).items(), *own_files(page).items()):
        path = runner.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    done = set()
    try:
        for line in ("", *RUN[page]):
            before = commands_before(page, line)
            for command in () if before in done else before:
                runner.run(command)
            done.add(before)
            if line:
                runner.run(line)
    finally:
        runner.close()


def own_files(page: str) -> dict[str, str]:
    """The smallest task, as its page has it: its folder is named only in the command."""
    if page != "task.md":
        return {}
    toml, python = (next(blocks({page: PAGES[page]}, language)) for language in ("toml", "python"))
    return {"my_task/pyproject.toml": toml.text, "my_task/task.py": python.text}


@pytest.mark.parametrize("page", SHELL)
def test_a_block_that_is_not_run_says_why(page: str) -> None:
    for block in SHELL[page]:
        assert block.not_run == bool(block.reason), block
        skipped = [line for line in lines_of(block) if not is_run(block, line)]
        assert bool(skipped) == block.not_run, f"{block}: nothing in it begins with {block.only!r}"
        if block.only:
            assert len(skipped) < len(lines_of(block)), f"{block}: nothing is left; mark the whole block"


def test_what_is_said_about_pages_is_about_what_they_have() -> None:
    for page, known in BEFORE.items():
        assert [one for one in known if not any(line.startswith(one) for line in RUN[page])] == []
    assert FILES.keys() <= RUN.keys()
    everything = "\n".join(line for lines in RUN.values() for line in lines)
    assert [long for long in SHORTER if long not in everything] == []
