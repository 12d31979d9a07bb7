"""A Flower app's folder: its pyproject.toml, its run config, its two app objects.

Invariant: the app's files are imported unmodified, from their own folder, again at each load; their
exceptions become TaskError with the file and line.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edgefl.errors import ConfigError, MissingExtra
from edgefl.task import UserCode, forget_modules, import_from
from edgefl.terminal.pairs import pair_of
from edgefl.training.own_randomness import OwnRandomness, state_digests

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

KIND = "Flower app"  # in errors of the user's code
DEFAULT_SUPERNODES = 2  # Flower's own default

RunConfigValue = bool | int | float | str

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowerApp:
    """A loaded app. Load it again for a second run, so that no state is left from the first."""

    name: str
    folder: Path
    server_app: ServerApp
    client_app: ClientApp
    config: Mapping[str, RunConfigValue]  # its defaults, flat: {"a.b": 1}
    num_supernodes: int = DEFAULT_SUPERNODES  # from its default federation, if it has one
    clients_randomness: OwnRandomness = field(default_factory=OwnRandomness)  # of its clients in this process


def is_flower_app(folder: str | Path) -> bool:
    """Whether a folder's pyproject.toml has [tool.flwr.app]; imports nothing."""
    try:
        return isinstance(_flwr_table(Path(folder)).get("app"), dict)
    except ConfigError:
        return False


def load_flower_app(folder: str | Path) -> FlowerApp:
    """Import an app's ServerApp and ClientApp from its folder.

    Raises ConfigError for a pyproject.toml without an app, TaskError if the user's module raises.
    """
    require_flower("a Flower app")
    from flwr.serverapp import ServerApp

    folder, table, app = _tables(folder)
    config = flatten(app.get("config", {}), where=f"{folder / 'pyproject.toml'}: [tool.flwr.app.config]")
    server, _ = _reference(folder, app, "serverapp"), _reference(folder, app, "clientapp")
    forget_modules(folder)
    before = state_digests()
    return FlowerApp(
        name=folder.name,
        folder=folder,
        server_app=_load(folder, server, ServerApp),
        client_app=load_client_app(folder),
        config=config,
        num_supernodes=_num_supernodes(table) or DEFAULT_SUPERNODES,
        clients_randomness=OwnRandomness(before),  # after the imports, which may seed
    )


def own_supernodes(folder: str | Path) -> int | None:
    """Return how many nodes an app's default federation has, if its pyproject.toml says so; imports nothing."""
    return _num_supernodes(_tables(folder)[1])


def load_client_app(folder: str | Path, name: str | None = None) -> ClientApp:
    """Import an app's ClientApp alone; raises as `load_flower_app` does. `name` is for its errors."""
    require_flower("a Flower app")
    from flwr.clientapp import ClientApp

    folder, _, app = _tables(folder)
    return _load(folder, _reference(folder, app, "clientapp"), ClientApp, name)


def client_reference(folder: str | Path) -> str:
    """Return `module:attribute` of an app's ClientApp, importing nothing; raises ConfigError."""
    folder, _, app = _tables(folder)
    return ":".join(_reference(folder, app, "clientapp"))


def require_flower(feature: str) -> None:
    """Raise MissingExtra if flwr is not installed."""
    try:
        import flwr  # noqa: F401 - to see that it is there
    except ImportError as cause:
        raise MissingExtra(feature, "flower") from cause


def fuse_run_config(app: FlowerApp, overrides: Mapping[str, RunConfigValue]) -> dict[str, RunConfigValue]:
    """Return the app's config with the overrides applied; raises ConfigError for a key that the app does not have."""
    if unknown := sorted(overrides.keys() - app.config.keys()):
        known = ", ".join(sorted(app.config)) or "none"
        raise ConfigError(f"{KIND} {app.name!r} has no run-config key {unknown[0]!r}; known: {known}")
    return {**app.config, **flatten(overrides, where="run config")}


def parse_run_config(settings: Iterable[str]) -> dict[str, RunConfigValue]:
    """Read `key=value` settings: values as in TOML, a bare word is a string."""
    config: dict[str, Any] = {}
    for setting in settings:
        key, text = pair_of("--set", setting)
        config[key] = _toml_value(text)
    return flatten(config, where="--set")


def parse_value(text: str) -> RunConfigValue:
    """Read one value as in TOML; anything but a number or a boolean is a string."""
    value = _toml_value(text)
    return value if isinstance(value, (bool, int, float, str)) else text


def flatten(table: Any, *, where: str, prefix: str = "") -> dict[str, RunConfigValue]:
    """Return nested tables as one, with keys joined by dots, as in Flower's Context."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} must be a table, not {table!r}")
    flat: dict[str, RunConfigValue] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, where=where, prefix=f"{prefix}{key}.")
        elif isinstance(value, (bool, int, float, str)):
            flat[f"{prefix}{key}"] = value
        else:
            raise ConfigError(f"{where}: {prefix}{key}={value!r} must be a number, a string or a boolean")
    return flat


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _tables(folder: str | Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Return the app's folder, [tool.flwr] and [tool.flwr.app]."""
    folder = Path(folder).expanduser().resolve()
    table = _flwr_table(folder)
    app = table.get("app")
    if not isinstance(app, dict):
        raise ConfigError(f"{folder / 'pyproject.toml'} has no [tool.flwr.app], so it is not a Flower app")
    return folder, table, app


def _flwr_table(folder: Path) -> dict[str, Any]:
    file = folder / "pyproject.toml"
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8")).get("tool", {}).get("flwr", {})
    except OSError as cause:
        raise ConfigError(f"cannot read {file}: {cause.strerror}") from cause
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, AttributeError) as cause:
        raise ConfigError(f"{file} is not a valid pyproject.toml: {cause}") from cause
    return table if isinstance(table, dict) else {}


def _reference(folder: Path, app: Mapping[str, Any], component: str) -> tuple[str, str]:
    """Return module and attribute of a component."""
    components = app.get("components")
    text = components.get(component) if isinstance(components, Mapping) else None
    module, colon, attribute = text.partition(":") if isinstance(text, str) else ("", "", "")
    if not (module and colon and attribute):
        seen = "is missing" if text is None else f"is {text!r}"
        raise ConfigError(
            f"{folder / 'pyproject.toml'}: [tool.flwr.app.components] {component} {seen}; "
            f'expected {component} = "module:attribute"'
        )
    top = module.partition(".")[0]
    if not (folder / f"{top}.py").is_file() and not (folder / top).is_dir():
        raise ConfigError(f"{folder} has no module {top!r}, which its pyproject.toml names as {component}")
    return module, attribute


def _load(folder: Path, reference: tuple[str, str], kind: type[_T], name: str | None = None) -> _T:
    module_name, attribute = reference
    app = name or folder.name
    with UserCode(app, f"importing {module_name!r}", KIND):
        found: Any = import_from(folder, module_name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{KIND} {app!r}: {module_name!r} has no attribute {attribute!r}")
        found = getattr(found, part)
    if not isinstance(found, kind):
        raise ConfigError(
            f"{KIND} {app!r}: {module_name}:{attribute} is of type {type(found).__name__}, not a {kind.__name__}"
        )
    return found


def _num_supernodes(table: Mapping[str, Any]) -> int | None:
    """Read `num-supernodes` of the default federation, as older projects set it."""
    federations = table.get("federations")
    if not isinstance(federations, Mapping):
        return None
    federation = federations.get(federations.get("default"))
    options = federation.get("options") if isinstance(federation, Mapping) else None
    number = options.get("num-supernodes") if isinstance(options, Mapping) else None
    return number if type(number) is int and number > 0 else None
