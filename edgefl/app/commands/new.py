"""`edgefl new`: a folder with a task that runs at once, its test, and comments that say what to change.

The files are templates in `edgefl/app/templates`: one folder per kind, and `torch`, which the kinds in PyTorch share.
In their names NAME becomes the module's name; in their texts {{...}} is replaced, see `rendered`.
Invariant: no existing file is changed.
"""

from __future__ import annotations

import json
import keyword
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import click

from edgefl.errors import ConfigError
from edgefl.terminal.extras import DISTRIBUTION, extra_of, install_command
from edgefl.terminal.output import Output, example, json_option

DEFAULT_KIND = "tabular"
MAX_NAME_CHARS = 32  # as in Flower
_NAME = re.compile(r"[a-z](?:[a-z0-9_-]*[a-z0-9])?")  # of a folder, and of a model when it is published
_SUFFIX = ".in"


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateKind:
    """What a new folder holds."""

    summary: str
    metric: str
    folders: tuple[str, ...]  # of templates; a file in a later one replaces one of the same name
    dependencies: tuple[str, ...]
    modules: tuple[str, ...]  # what simulating it imports


_TORCH, _SKLEARN = f"{DISTRIBUTION}[train]", "scikit-learn>=1.4,<2"
KINDS: Mapping[str, TemplateKind] = {
    "image": TemplateKind(
        summary="A CNN that reads handwritten digits.", metric="accuracy",
        folders=("torch", "image"), dependencies=(_TORCH, _SKLEARN), modules=("torch", "sklearn"),
    ),
    "tabular": TemplateKind(
        summary="Regression on a table, measured by R2.", metric="r2",
        folders=("torch", "tabular"), dependencies=(_TORCH,), modules=("torch",),
    ),
    "text": TemplateKind(
        summary="Embeddings that find the topic of a short text.", metric="accuracy",
        folders=("torch", "text"), dependencies=(_TORCH,), modules=("torch",),
    ),
    "sensor": TemplateKind(
        summary="A 1-D CNN that finds the state of a machine by its vibration.", metric="accuracy",
        folders=("torch", "sensor"), dependencies=(_TORCH,), modules=("torch",),
    ),
    "sklearn": TemplateKind(
        summary="A scikit-learn model with its own fit.", metric="accuracy",
        folders=("sklearn",), dependencies=(DISTRIBUTION, _SKLEARN), modules=("sklearn", "skl2onnx"),
    ),
    "flower": TemplateKind(
        summary="A Flower app in PyTorch, without any edgefl code.", metric="accuracy",
        folders=("flower",), dependencies=("flwr>=1.42,<1.43", "torch>=2.9", _SKLEARN),
        modules=("flwr", "torch", "sklearn"),
    ),
}  # fmt: skip
_ABOUT: Mapping[str, str] = {  # for the printed tree
    "NAME.py": "what is trained: start here",
    "test_NAME.py": "its tests",
    "config.toml": "settings of rounds and training",
    "pyproject.toml": "where the task is, and what it needs",
    "README.md": "the commands that come next",
}


@click.command(
    epilog=example("edgefl new wine", "edgefl new camera --kind image")
    + "\n\n\b\nKinds:\n" + "\n".join(f"  {name:8} {kind.summary}" for name, kind in KINDS.items())
)  # fmt: skip
@click.argument("folder", metavar="NAME", type=click.Path(path_type=Path))
@click.option("--kind", type=click.Choice(tuple(KINDS)), default=DEFAULT_KIND, show_default=True)
@json_option
def new(*, folder: Path, kind: str, output: Output) -> None:
    """Write a task that runs at once, with its test: folder NAME.

    Change it into your own. Its data are made up, or part of scikit-learn: nothing is downloaded.
    """
    name = folder.name
    refuse_name(name, kind)
    _refuse_existing(folder)
    texts = rendered(KINDS[kind], name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            with (folder / file).open("x", encoding="utf-8") as new_file:
                new_file.write(text)
    except OSError as cause:
        raise ConfigError(f"cannot write {cause.filename or folder}: {cause.strerror}") from cause
    _say_what_is_there(folder, kind, list(texts), output)
    output.result({"name": name, "kind": kind, "files": list(texts)})


def module_of(name: str) -> str:
    """Return the name of the task's module: a folder's may have hyphens, a module's may not."""
    return name.replace("-", "_")


def refuse_name(name: str, kind: str = DEFAULT_KIND) -> None:
    """Raise ConfigError for a name that cannot be that of a folder, a model and (with _ for -) a Python module."""
    if not _NAME.fullmatch(name) or len(name) > MAX_NAME_CHARS:
        usable = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:MAX_NAME_CHARS].strip("-")
        such_as = f", such as {usable}" if _NAME.fullmatch(usable) else ""
        raise ConfigError(
            f"{name[:80]!r} cannot be a name: expected 1 to {MAX_NAME_CHARS} of a-z 0-9 _ -, the first a letter, the "
            f"last a letter or digit{such_as}"
        )
    if kind == "flower" and "_" in name:
        raise ConfigError(f"Flower allows no _ in an app's name: choose another, such as {name.replace('_', '-')}")
    module = module_of(name)
    if keyword.iskeyword(module) or module.startswith("test_"):
        what = "is a word of the Python language" if keyword.iskeyword(module) else "is the name of a file of tests"
        raise ConfigError(f"{name!r} {what}; choose another, such as my-{name}")
    if (place := _place_of_module(module)) is not None:
        raise ConfigError(
            f"there is already a Python module {module!r} ({place}), which the new one would hide; choose another "
            f"name, such as my-{name}"
        )


def rendered(kind: TemplateKind, name: str) -> dict[str, str]:
    """Return a new folder's files and their texts, the task's module first."""
    values = {
        "name": name,
        "module": module_of(name),
        "summary": kind.summary,
        "metric": kind.metric,
        "dependencies": json.dumps(list(kind.dependencies)),
    }
    texts = dict(template for folder in kind.folders for template in _templates(folder))
    filled = {file: re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], text) for file, text in texts.items()}
    return {file.replace("NAME", module_of(name)): filled[file] for file in _ABOUT if file in filled}


def _templates(folder: str) -> Iterator[tuple[str, str]]:
    for file in (files("edgefl.app") / "templates" / folder).iterdir():
        if file.name.endswith(_SUFFIX):
            yield file.name.removesuffix(_SUFFIX), file.read_text(encoding="utf-8")


def _refuse_existing(folder: Path) -> None:
    try:
        taken = folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir())))
    except OSError as cause:
        raise ConfigError(f"cannot read {folder}: {cause.strerror}") from cause
    if taken:
        what = "is a folder that is not empty" if folder.is_dir() else "is there already and is no folder"
        raise ConfigError(f"{folder} {what}, and nothing in it is changed; choose another name")


def _place_of_module(name: str) -> str | None:
    """Return where an importable module is, None if there is none; a folder of other files is none."""
    if name in sys.stdlib_module_names:
        return "of Python itself"
    spec = find_spec(name)
    return None if spec is None else spec.origin


def _say_what_is_there(folder: Path, kind: str, names: list[str], output: Output) -> None:
    about = {file.replace("NAME", module_of(folder.name)): text for file, text in _ABOUT.items()}
    width, shown = max(map(len, names)), shlex.quote(str(folder))
    output.line(f"{folder}/")
    for file in names:
        output.line(f"  {file:{width}}  {about[file]}")
    output.line("next:")
    for command in (*_installations(KINDS[kind]), f"edgefl simulate {shown} --clients 10 --rounds 5",
                    f"python -m pytest {shown}"):  # fmt: skip
        output.line(f"  {command}")


def _installations(kind: TemplateKind) -> Iterator[str]:
    """Yield the commands that install what is missing for the simulation and the tests."""
    missing = [module for module in kind.modules if find_spec(module) is None]
    if extras := ",".join(dict.fromkeys(filter(None, map(extra_of, missing)))):
        yield install_command(extras)
    if find_spec("pytest") is None:
        yield f"{sys.executable} -m pip install pytest"
