"""The documentation as tests see it: pages with their blocks of code, those of the README and the examples, too."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from docs.generate import api, commands, configuration

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_BLOCK = re.compile(r"^(?P<indent> *)```(?P<head>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
_ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')
_INCLUDE = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)


@dataclass(frozen=True)
class Block:
    page: str
    language: str  # empty if none is given
    text: str
    titled: bool  # a whole file
    not_run: bool = False  # marked: `{.not-run reason="..."}`
    only: str = ""  # of a marked block, the lines that are not run begin so; empty = all
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.page}: {self.text.splitlines()[0] if self.text else ''}"


def written() -> dict[str, str]:
    """Page -> Markdown, of the pages in docs/."""
    return {str(path.relative_to(DOCS)): included(path.read_text("utf-8")) for path in sorted(DOCS.rglob("*.md"))}


def generated() -> dict[str, str]:
    pages = {"configuration": configuration, "commands": commands, "api": api}
    return {f"reference/{name}.md": module.page() for name, module in pages.items()}


def others() -> dict[str, str]:
    """The README, and those of the examples: their commands are checked, too."""
    paths = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("examples/*/README.md"))]
    return {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in paths}


def included(text: str) -> str:
    return _INCLUDE.sub(lambda found: (ROOT / found[1]).read_text("utf-8"), text)


def blocks(pages: dict[str, str], *languages: str) -> Iterator[Block]:
    for page, text in pages.items():
        for found in _BLOCK.finditer(text):
            language = found["head"].split()[0] if found["head"].strip() else ""
            if language in languages:
                lines = (line.removeprefix(found["indent"]) for line in found["text"].splitlines())
                head = found["head"]
                told = dict(_ATTRIBUTE.findall(head))
                yield Block(
                    page, language, "\n".join(lines), "title=" in head, ".not-run" in head, told.get("only", ""),
                    told.get("reason", ""),
                )  # fmt: skip


def lines_of(block: Block) -> list[str]:
    """Return a block's commands, each in one line."""
    return [line for line in block.text.replace("\\\n", " ").splitlines() if line.strip()]


def is_run(block: Block, line: str) -> bool:
    """Whether the tests run a line of a block."""
    return not block.not_run or (bool(block.only) and not line.startswith(block.only))


def without_blocks(text: str) -> str:
    return _BLOCK.sub("", text)


def shell_words(block: Block) -> Iterator[list[str]]:
    """Yield the commands of a block as words, with those that are an argument of `sh -c`."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split = True
        for word in lexer:
            if set(word) <= set("|&;"):
                yield words
                words = []
            else:
                words.append(word)
        if "-c" in words[:-1]:
            yield from shell_words(Block(block.page, "sh", words[words.index("-c") + 1], titled=False))
        yield words
