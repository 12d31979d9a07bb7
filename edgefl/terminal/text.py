"""Untrusted text: which characters are safe on one line, and how others are shown.

Unsafe are characters that move a terminal's cursor, start a line, change the direction of writing, or cannot be
encoded: control characters, line separators, direction marks, lone surrogates.
Invariant: `one_line` returns safe text, and returns safe text unchanged.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

MAX_NAMES = 3  # that share a reason and are named

_UNSAFE = "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_BLANKS = re.compile("[\t-\r\x85\u2028\u2029]+ *")  # line ends and tabs
_BAD = re.compile(f"[{_UNSAFE}]")
_BAD_ON_LINES = re.compile(f"(?![\n\t])[{_UNSAFE}]")


def is_safe(text: str) -> bool:
    """Whether a text can be shown on one line, encoded and stored."""
    return _BAD.search(text) is None


def one_line(text: str, max_chars: int | None = None) -> str:
    """Return a text as one line: line ends become spaces, other unsafe characters are escaped."""
    cut = max_chars is not None and len(text) > 2 * max_chars  # cut first, to limit the work
    shown = text[: 2 * max_chars] if cut and max_chars is not None else text
    if not is_safe(shown):
        shown = _BAD.sub(_escaped, _BLANKS.sub(" ", shown).strip())
    if max_chars is not None and (cut or len(shown) > max_chars):
        return shown[: max_chars - 3] + "..."
    return shown


def lines(text: str) -> str:
    """Return a text with its line ends and tabs kept, and other unsafe characters shown escaped."""
    return _BAD_ON_LINES.sub(_escaped, text.replace("\r\n", "\n"))


def grouped(reasons: Mapping[str, str], most: int | None = None) -> str:
    """Return each reason once, after the names that have it: `cam-1, cam-2 and 7 more: no data; cam-4: ...`."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    told = list(names.items())[:most]
    texts = [f"{_listed(having)}: {reason}" for reason, having in told]
    if more := len(reasons) - sum(len(having) for _, having in told):
        texts.append(f"and {more} more")
    return "; ".join(texts)


def for_json(value: Any) -> Any:
    """Return a value for strict JSON: text on one line, null for a number that is not finite."""
    if isinstance(value, str):
        return one_line(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {one_line(key) if isinstance(key, str) else key: for_json(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [for_json(one) for one in value]
    return value


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _listed(names: Sequence[str]) -> str:
    if len(names) <= MAX_NAMES + 1:  # "and 1 more" would be no shorter
        return ", ".join(names)
    return f"{', '.join(names[:MAX_NAMES])} and {len(names) - MAX_NAMES} more"
