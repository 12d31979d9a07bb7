"""Options in Flower's syntax, read without flwr: `--run-config`, `--federation-config`, `$FLWR_HOME/config.toml`.

    --run-config "rounds=3 lr=0.1" --run-config 'name="x y"'     or one TOML file
    --federation-config "num-supernodes=4 client-resources-num-cpus=1"

Settings for Ray only (backend, init-args, fractions of a GPU) have no meaning here: on the command line they are
refused; in the file, which other runs need, they are ignored with a note.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgefl.errors import ConfigError
from edgefl.flower.apps.app import RunConfigValue, flatten, parse_value

RUN_CONFIG, FEDERATION_CONFIG = "--run-config", "--federation-config"
NODES, CPUS, GPUS = "num-supernodes", "client-resources-num-cpus", "client-resources-num-gpus"
_WORD = re.compile(r"([^\s=]+)=('[^']*'|\"[^\"]*\"|\S+)\s*")  # as in Flower
_OF_RAY = re.compile("backend|verbose|init-args-.*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Federation:
    """Settings of a simulated federation; None = not set."""

    num_supernodes: int | None = None
    client_cpus: int | None = None  # CPUs for each running client
    ignored: tuple[str, ...] = ()  # keys that have no meaning here

    def workers(self, cores: int) -> int | None:
        """Return how many processes train: 0 = only this one, None = no setting limits it."""
        if self.client_cpus is None or self.client_cpus <= 1:
            return None
        at_once = cores // self.client_cpus
        return at_once if at_once > 1 else 0


def read_run_config(texts: Sequence[str]) -> dict[str, RunConfigValue]:
    """Return the values of `--run-config`; raises ConfigError unless it is `key=value` pairs or one TOML file."""
    files = [text for text in texts if text.endswith(".toml")]
    if files and len(texts) > 1:
        raise ConfigError(f"{RUN_CONFIG} {files[0]} and more: give either one TOML file or key=value pairs")
    if files:
        return flatten(_read_toml(Path(files[0]).expanduser(), RUN_CONFIG), where=files[0])
    return _words(texts, RUN_CONFIG)


def read_federation(texts: Sequence[str]) -> Federation:
    """Return the settings of `--federation-config`; raises ConfigError for an unusable key or value."""
    settings = {_key(key): value for key, value in _words(texts, FEDERATION_CONFIG).items()}
    return _federation(settings, FEDERATION_CONFIG, strict=True)


def federation_at_home() -> Federation:
    """Return the settings of the default connection in `$FLWR_HOME/config.toml`; none if there is no such file."""
    file = Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr").expanduser() / "config.toml"
    if not file.is_file():
        return Federation()
    links = _read_toml(file, "Flower's configuration").get("superlink")
    link = links.get(links.get("default")) if isinstance(links, Mapping) else None
    options = link.get("options") if isinstance(link, Mapping) else None
    if not isinstance(options, Mapping):
        return Federation()
    settings = {_key(key): value for key, value in flatten(options, where=f"{file}: options").items()}
    return _federation(settings, str(file), strict=False)


def _federation(settings: Mapping[str, RunConfigValue], where: str, *, strict: bool) -> Federation:
    ignored = []
    for key, value in settings.items():
        if key in {NODES, CPUS}:
            continue
        if not _OF_RAY.fullmatch(key) and key != GPUS:
            raise ConfigError(f"{where}: there is no {key!r}; known: {NODES}, {CPUS}")
        if strict and value:
            raise ConfigError(f"{where} {key}={value}: {_instead(key)}")
        ignored += [key] if value else []
    nodes, cpus = (_whole(settings[key], f"{where} {key}") if key in settings else None for key in (NODES, CPUS))
    return Federation(num_supernodes=nodes, client_cpus=cpus, ignored=tuple(ignored))


def _instead(key: str) -> str:
    if key == GPUS:
        return (
            "edgefl does not divide a GPU: every client sees all GPUs. Drop the setting; "
            "--engine loop runs one client at a time"
        )
    return "this is for Ray, which does not run Flower apps here. Drop it and choose --engine loop or pool"


def _whole(value: RunConfigValue, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < 1:
        raise ConfigError(f"{where}={value!r}; expected a whole number of 1 or more")
    return int(value)


def _key(key: str) -> str:
    """Return a key as Flower 1.42 writes it; older versions nest it in `options.backend`."""
    key = key.replace("_", "-").removeprefix("options.")
    return "backend" if key == "backend.name" else key.removeprefix("backend.").replace(".", "-")


def _words(texts: Sequence[str], flag: str) -> dict[str, RunConfigValue]:
    found: dict[str, RunConfigValue] = {}
    for text in texts:
        place, rest = 0, text.strip()
        while place < len(rest):
            match = _WORD.match(rest, place)
            if match is None:
                raise ConfigError(
                    f"{flag} {text!r}: {rest[place:]!r} is not of the form key=value; expected "
                    f'{flag} "key=value key=value", without spaces around the ='
                )
            found[match[1]] = parse_value(match[2])
            place = match.end()
    return found


def _read_toml(file: Path, what: str) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as cause:
        raise ConfigError(f"{what}: cannot read {file}: {cause.strerror}") from cause
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as cause:
        raise ConfigError(f"{what}: {file} is not TOML: {cause}") from cause
