"""The configuration reference, from the dataclasses that read the file: sections, keys, types, defaults, comments."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin, get_type_hints

from docs.generate.comments import field_comments
from docs.generate.markdown import prose, table
from edgefl.config import JobConfig
from edgefl.simulation.world.draws import Spread
from edgefl.simulation.world.settings import SimulationConfig

HEAD = """# Configuration

One TOML file, given with `--config FILE`. `--set section.key=value` overrides it. A key that does not exist is an
error that names the known ones, and a value that cannot be used is refused before anything starts.

```toml
[rounds]
count = 20
quorum = 2

[train]
epochs = 2
lr = 0.1

[server]
optimizer = "Adam"
lr = 0.01
options = { betas = [0.9, 0.99] }
```

`edgefl run` reads the sections of a job. `edgefl simulate` reads these and the sections of a simulation, so that the
same file serves both.
"""
_TYPES = {int: "integer", float: "number", str: "text", bool: "boolean"}
_SPREAD = "[distribution](#distributions)"


def sections(config: type, path: str = "") -> Iterator[tuple[str, type]]:
    """Yield the name and the class of each section below a configuration."""
    for name, hint in get_type_hints(config).items():
        if is_section(hint):
            yield path + name, hint
            yield from sections(hint, f"{path}{name}.")


def is_section(hint: object) -> bool:
    """Return whether a field is a section of its own; a distribution is a value."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint) and hint is not Spread


def keys(kind: type) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, type, default and comment of each key of a section."""
    hints, comments = get_type_hints(kind), field_comments(kind)
    for one in dataclasses.fields(kind):
        if not is_section(hints[one.name]):
            default = _default(one)
            shown = "not set" if default is None else f"`{_toml(default)}`"
            yield one.name, _type_text(hints[one.name]), shown, prose(comments.get(one.name, ""))


def page() -> str:
    """Return the page."""
    of_jobs = dict(sections(JobConfig))
    parts = [HEAD, "## Sections of a job"]
    simulated = False
    for path, kind in sections(SimulationConfig):
        if path not in of_jobs and not simulated:
            simulated = True
            parts.append("## Sections of a simulation")
        parts.extend((f"### `[{path}]` {{ #{path.replace('.', '-')} }}", _described(kind)))
    parts.extend(("## Distributions", _described(Spread)))
    return "\n\n".join(parts) + "\n"


def _described(kind: type) -> str:
    rows = ((f"`{name}`", *rest) for name, *rest in keys(kind))
    return f"{prose(inspect.getdoc(kind) or '')}\n\n{table(('key', 'type', 'default', 'what it is'), rows)}"


def _type_text(hint: Any) -> str:
    if hint is Spread:
        return _SPREAD
    if get_origin(hint) in {typing.Union, types.UnionType}:
        return " or ".join(_type_text(one) for one in get_args(hint) if one is not type(None))
    if get_origin(hint) is Sequence:
        return f"list of {_type_text(get_args(hint)[0])}s"
    return "table" if get_origin(hint) is Mapping else _TYPES[hint]


def _default(one: dataclasses.Field[Any]) -> Any:
    return one.default_factory() if one.default_factory is not dataclasses.MISSING else one.default


def _toml(value: Any) -> str:
    """Return a default as one writes it in the file; of a distribution, what differs from its own defaults."""
    if isinstance(value, Spread):
        value = {
            one.name: getattr(value, one.name)
            for one in dataclasses.fields(value)
            if one.name == "mean" or getattr(value, one.name) != one.default
        }
    if isinstance(value, Mapping):
        inside = ", ".join(f"{name} = {_toml(each)}" for name, each in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return str(value).lower() if isinstance(value, bool) else f"{value:.4g}" if value == 1 / 3 else str(value)
