"""The bounds of a setting's value: each function raises ConfigError with the key, the value and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

from edgefl.errors import ConfigError
from edgefl.terminal.values import shown_value

MAX_RATE = 3.4028234663852886e38  # the largest float32: a larger value would be infinity where it is used
MAX_COUNT = 2**31 - 1  # limit of rounds, clients, epochs and samples: every layer can count so far
MAX_SECONDS = 366 * 86_400.0  # limit of a wait: locks, sockets and event loops accept it, on 32-bit machines too
MAX_NAME_CHARS = 200


def require(condition: bool, message: str) -> None:  # noqa: FBT001 - reads as a sentence
    """Raise ConfigError with this message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_within(key: str, value: float, least: float, most: float) -> None:
    """Raise ConfigError for a number outside its bounds, or NaN."""
    if not least <= value <= most:
        raise ConfigError(f"{key}={shown_value(value)} must be {least} or more, and at most {most}")


def require_one_of(key: str, value: str, known: Sequence[str]) -> None:
    """Raise ConfigError for a text that is none of these."""
    require(value in known, f"{key}={shown_value(value)} is not one of: {', '.join(known)}")


def require_above_zero(key: str, value: float, most: float) -> None:
    """Raise ConfigError for a number that is not above 0 and at most `most`, or NaN."""
    if not 0 < value <= most:
        raise ConfigError(f"{key}={shown_value(value)} must be above 0, and at most {most}")


def require_printable(key: str, value: str) -> None:
    """Raise ConfigError for a text with control characters, or a long one."""
    if not value.isprintable() or len(value) > MAX_NAME_CHARS:
        raise ConfigError(f"{key}={shown_value(value)} must be printable, and of at most {MAX_NAME_CHARS} characters")


def require_plain(key: str, value: object) -> None:
    """Refuse values that JSON cannot hold or no optimizer accepts: dates, tables, NaN."""
    if isinstance(value, list | tuple):
        for one in value:
            require_plain(key, one)
    elif isinstance(value, str):
        require_printable(key, value)
    elif isinstance(value, bool) or value is None:
        return
    elif not isinstance(value, int | float) or not -MAX_RATE <= value <= MAX_RATE:
        raise ConfigError(
            f"{key}={shown_value(value)} must be a number from {-MAX_RATE} to {MAX_RATE}, true, false, a text or a "
            "list of them"
        )
