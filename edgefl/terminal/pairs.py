"""Parse `key=value` options: --set, --sweep, --data, --tag. One parser, so that all give the same errors."""

from __future__ import annotations

from collections.abc import Iterable

from edgefl.errors import ConfigError


def pair_of(option: str, text: str, form: str = "key=value") -> tuple[str, str]:
    """Return key and value, with spaces around the key removed; raises ConfigError with the option and the form."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{option} {text!r} is not of the form {form}")
    return key.strip(), value


def pairs_of(option: str, texts: Iterable[str]) -> dict[str, str]:
    """Return the values by key; if a key is given twice, the last value is used."""
    return dict(pair_of(option, text) for text in texts)
