"""The variants of a sweep: e.g. every combination of `train.lr=0.1,0.3` and `server.optimizer=SGD,Adam`.

Values are separated by commas outside of brackets and quotes, and read as `--set` reads them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgefl.config import parse_value
from edgefl.errors import ConfigError
from edgefl.terminal.pairs import pair_of

FORM = "section.key=value,value"

_OPENING, _CLOSING, _QUOTES = "[{", "]}", "\"'"


@dataclass(frozen=True, slots=True)
class Variant:
    """One combination of settings."""

    settings: Mapping[str, Any]  # e.g. {"train.lr": 0.1}

    @property
    def name(self) -> str:
        """Its name in tables and plots: `train.lr=0.1, server.optimizer=Adam`."""
        return ", ".join(f"{key}={_text(value)}" for key, value in self.settings.items())


def parse_sweep(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Read `key=value,value` words; raises ConfigError for one that is not of this form."""
    over: dict[str, list[Any]] = {}
    for text in texts:
        key, values = pair_of("--sweep", text, FORM)
        parts = _split(values)
        if not all(part.strip() for part in parts):
            raise ConfigError(f"--sweep {text!r} is not of the form {FORM}")
        if key in over:
            raise ConfigError(f"--sweep {text!r}: {key!r} is already in another --sweep; write all its values into one")
        over[key] = [parse_value(part.strip()) for part in parts]
    return over


def variants_of(over: Mapping[str, Sequence[Any]]) -> list[Variant]:
    """Return every combination, the last key's values changing fastest; raises ConfigError for a value named twice."""
    for key, values in over.items():
        if isinstance(values, str) or not values:
            raise ConfigError(f"sweep over {key!r}: {values!r} is no list of values")
        if twice := [value for index, value in enumerate(values) if value in values[:index]]:
            raise ConfigError(f"sweep over {key!r}: {_text(twice[0])} occurs twice")
    return [Variant(dict(zip(over, chosen, strict=True))) for chosen in itertools.product(*over.values())]


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in _QUOTES:
            quote = letter
        depth += 0 if quote else (letter in _OPENING) - (letter in _CLOSING)
        if letter == "," and not quote and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
