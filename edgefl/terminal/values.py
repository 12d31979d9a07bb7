"""Values for messages, also those that Python refuses to print."""

from __future__ import annotations

_MAX_SHOWN_BITS = 256


def shown_value(value: object) -> str:
    """Return a value for a message, of at most 200 characters."""
    if isinstance(value, int) and value.bit_length() > _MAX_SHOWN_BITS:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = f"{value!r:.200}"
    except (ValueError, RecursionError):  # Python refuses to print integers of thousands of digits
        text = f"a {type(value).__name__} that cannot be shown"
    return text.encode(errors="backslashreplace").decode()
