"""Which version of the protocol between a region and its parent each of them speaks, as metadata of their calls.

Each side states its version and refuses one that it does not speak, in words that say which of the two is to be
updated. The number changes when one side could misunderstand the other; new kinds of entries do not change it, because
a reader ignores an entry of an unknown kind and logs it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from edgefl.process.version import __version__
from edgefl.terminal.text import one_line

PROTOCOL = 1
LEAST = 1  # the oldest version that this side still speaks
PROTOCOL_KEY, VERSION_KEY = "edgefl-tier-protocol", "edgefl-version"
MAX_CHARS = 40


def stated() -> tuple[tuple[str, str], ...]:
    """Return this side's version, as gRPC metadata."""
    return (PROTOCOL_KEY, str(PROTOCOL)), (VERSION_KEY, __version__)


def version_fault(peer: str, here: str, metadata: Iterable[Any] | None) -> str:
    """Return why a peer's version is not spoken `here`, and which of the two to update; empty if it is.

    Both are named for people, e.g. "region 'oslo'" and "the cloud".
    """
    said = {key: str(value) for key, value in metadata or ()}
    number, release = said.get(PROTOCOL_KEY, ""), one_line(said.get(VERSION_KEY, ""), MAX_CHARS)
    protocol = int(number) if number.isdecimal() and len(number) < MAX_CHARS else 0  # 0 = from before it was stated
    if LEAST <= protocol <= PROTOCOL:
        return ""
    spoken = f"{LEAST} to {PROTOCOL}" if LEAST < PROTOCOL else f"{PROTOCOL}"
    older = peer if protocol < LEAST else here
    return (
        f"{peer} runs edgefl {release or 'of an unknown version'} and speaks version {protocol} of the protocol of "
        f"regions; {here} runs edgefl {__version__} and speaks version {spoken}. Update {older}: "
        "`pip install --upgrade edgefl-fleet`, then start it again"
    )
