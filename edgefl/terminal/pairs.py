"""`key=value` as options take it: --set, --sweep, --data, --tag. One reader, so that all refuse alike."""

from __future__ import annotations

from collections.abc import Iterable

from edgefl.errors import ConfigError


def pair_of(option: str, text: str, form: str = "key=value") -> tuple[str, str]:
    """Return key and value, the key without spaces around it; raises ConfigError, which names the option and form."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{option} {text!r} is not of the form {form}")
    return key.strip(), value


def pairs_of(option: str, texts: Iterable[str]) -> dict[str, str]:
    """Return the values by their keys; of a key that is given twice the last one counts."""
    return dict(pair_of(option, text) for text in texts)
