"""What a task requires of the machine that runs it: the `[project] dependencies` of its pyproject.toml (PEP 621).

Requirements are read as pip reads them (PEP 508): markers of other platforms are skipped, and an extra stands for what
it brings. Only the metadata of installed packages is read; nothing is imported.
Invariant: an unmet requirement is told with what is installed, such as `scikit-learn>=1.4, has 1.2.2`.
"""

from __future__ import annotations

import shlex
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgefl.errors import ConfigError
from edgefl.terminal.extras import DISTRIBUTION, install_command, running_command

if TYPE_CHECKING:
    from packaging.requirements import Requirement

MAX_REQUIREMENTS = 200
HAS_NONE = ", has none"
_BRINGING = (
    "agent",
    "train",
    "cloud",
    "sim",
    "flower",
    "ray",
    "tensorboard",
    "examples",
    "keras",
)  # the smallest first
_OWN_NAMES = frozenset({DISTRIBUTION, "edgefl"})  # how tasks call this distribution


class InstalledPackages:
    """The packages of this Python environment."""

    def version(self, name: str) -> str | None:
        """Return the version of a package, None if it is not installed."""
        try:
            return distribution(name).version
        except PackageNotFoundError:
            return None

    def requires(self, name: str) -> Sequence[str]:
        """Return the requirements of an installed package, with those of its extras."""
        return distribution(name).requires or ()


def requirements_in(folder: Path) -> tuple[str, ...]:
    """Return the dependencies of a task's folder; none if its pyproject.toml has none. Raises ConfigError."""
    file = folder / "pyproject.toml"
    try:
        return requirements_of(file.read_text(encoding="utf-8"), str(file))
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as cause:
        raise ConfigError(f"cannot read {file}: {cause}") from cause


def requirements_of(pyproject: str, where: str) -> tuple[str, ...]:
    """Return the dependencies in a pyproject.toml's text; raises ConfigError, which names `where` it is."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        project: Any = tomllib.loads(pyproject).get("project", {})
    except tomllib.TOMLDecodeError as cause:
        raise ConfigError(f"{where} is not a valid pyproject.toml: {cause}") from cause
    found = project.get("dependencies", []) if isinstance(project, Mapping) else []
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found) or len(found) > MAX_REQUIREMENTS:
        raise ConfigError(f"{where}: [project] dependencies is {found!r:.100}; expected a list of requirements")
    for one in found:
        try:
            Requirement(one)
        except InvalidRequirement as cause:
            why = " ".join(str(cause).split())
            raise ConfigError(f"{where}: [project] dependencies: {one!r} is not a requirement: {why}") from cause
    return tuple(found)


def unmet(requirements: Sequence[str], installed: InstalledPackages | None = None) -> list[str]:
    """Return the requirements that are not met here, each with what is: `scikit-learn>=1.4, has none`."""
    from packaging.requirements import Requirement

    known = installed or InstalledPackages()
    found: dict[str, None] = {}
    for text in requirements:
        found |= dict.fromkeys(_unmet(Requirement(text), known, set()))
    return list(found)


def refuse_unmet(task: str, folder: Path) -> None:
    """Raise ConfigError, with the command that installs them, for a task whose dependencies are not met here."""
    if missing := unmet(requirements_in(folder)):
        raise ConfigError(f"task {task!r} {needs(missing)}. Install what is missing: {_install_command(missing)}")


def _install_command(missing: Sequence[str]) -> str:
    """Return the command that installs unmet requirements: by extras of edgefl if these bring all of them."""
    from packaging.requirements import Requirement

    by_extras = [extra_with(Requirement(requirement_in(one)).name) for one in missing if one.endswith(HAS_NONE)]
    if len(by_extras) == len(missing) and all(by_extras):
        return install_command(",".join(dict.fromkeys(filter(None, by_extras))))
    wanted = " ".join(shlex.quote(requirement_in(one)) for one in missing)
    return f"{sys.executable} -m pip install {wanted}"


def extra_with(package: str, installed: InstalledPackages | None = None) -> str | None:
    """Return the extra of edgefl that brings a package: the running command's own if there are several."""
    from packaging.requirements import Requirement

    known = installed or InstalledPackages()
    if known.version(DISTRIBUTION) is None:
        return None  # it runs from a clone that was never installed
    found = [
        extra
        for one in map(Requirement, known.requires(DISTRIBUTION))
        if one.marker is not None and _normal(one.name) == _normal(package)
        for extra in _BRINGING
        if one.marker.evaluate({"extra": extra}) and not one.marker.evaluate({"extra": ""})
    ]
    return "sim" if "sim" in found and running_command() == "simulate" else next(iter(found), None)


def needs(missing: Sequence[str]) -> str:
    """Return `needs a>=1, has none; needs b<3, has 3.2`."""
    return "; ".join(f"needs {one}" for one in missing)


def requirement_in(told: str) -> str:
    """Return the requirement in what `unmet` tells."""
    return told.rpartition(", has ")[0]


def _unmet(requirement: Requirement, installed: InstalledPackages, seen: set[tuple[str, str]]) -> Iterator[str]:
    """Yield what is missing of a requirement and of its extras; `seen` are the extras that were followed."""
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return
    is_own = _normal(requirement.name) in _OWN_NAMES
    name = DISTRIBUTION if is_own else requirement.name
    version = installed.version(name)
    if version is None and is_own:
        return  # it runs from a clone that was never installed
    wanted = requirement.name + ",".join(sorted(map(str, requirement.specifier), reverse=True))  # >=1,<2
    if version is None:
        yield wanted + HAS_NONE
        return
    if requirement.specifier and not requirement.specifier.contains(version, prereleases=True):
        yield f"{wanted}, has {version}"
    for extra in sorted(requirement.extras):
        if (name, extra) not in seen:
            seen.add((name, extra))
            yield from _unmet_of_extra(name, extra, installed, seen)


def _unmet_of_extra(name: str, extra: str, installed: InstalledPackages, seen: set[tuple[str, str]]) -> Iterator[str]:
    from packaging.requirements import Requirement

    for text in installed.requires(name):
        one = Requirement(text)
        belongs = one.marker is not None and one.marker.evaluate({"extra": extra})
        if belongs and not one.marker.evaluate({"extra": ""}):  # type: ignore[union-attr]  # checked in the line above
            one.marker = None
            yield from _unmet(one, installed, seen)


def own_closure(extras: Sequence[str], installed: InstalledPackages | None = None) -> dict[str, str]:
    """Return the versions of the installed packages that edgefl needs with these extras, and of what they need."""
    from packaging.requirements import Requirement

    known = installed or InstalledPackages()
    found: dict[str, str] = {}
    waiting = [(DISTRIBUTION, ("", *extras))]
    while waiting:
        name, wanted = waiting.pop()
        if name in found or (version := known.version(name)) is None:
            continue
        found[name] = version
        waiting += [
            (_normal(one.name), ("", *sorted(one.extras)))
            for one in map(Requirement, known.requires(name))
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in wanted)
        ]
    return found


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
