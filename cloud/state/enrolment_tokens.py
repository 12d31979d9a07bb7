"""Enrolment tokens as operators see them: listed and revoked by an id, never shown.

The id of a token is the beginning of its secret's SHA-256: it identifies a token and helps nobody to use it.
Invariant: a token is open, used, expired or revoked; only an open one enrols a device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from cloud.state.store import tokens
from edgefl.errors import ConfigError, NotFound
from edgefl.protocols.labels import check_label

ID_CHARS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRow:
    """One token. Times are in seconds since 1970."""

    id: str
    state: str  # open | used | expired | revoked
    label: str | None
    made_s: float | None  # None = by an older cloud
    expires_s: float
    used_by: str | None  # device


class EnrolmentTokens:
    """The tokens of one database. Methods may be called from any thread."""

    def __init__(self, engine: sa.Engine, clock: Callable[[], float] = time.time) -> None:
        self._engine, self._clock = engine, clock

    def list(self) -> list[TokenRow]:
        """Return every token, the newest first."""
        order = (sa.func.coalesce(tokens.c.made_s, 0).desc(), tokens.c.expires_s.desc())
        with self._engine.connect() as db:
            return [self._shown(row) for row in db.execute(tokens.select().order_by(*order)).mappings()]

    def revoke(self, word: str) -> TokenRow:
        """Revoke the open token with this id, beginning of an id, or label, and return it.

        Raises NotFound if there is none, ConfigError if there are several or the token is not open.
        """
        found = [one for one in self.list() if word and (one.id.startswith(word) or one.label == word)]
        if not found:
            raise NotFound(f"there is no token {word!r}; list them with `edgefl cloud tokens list`")
        usable = [one for one in found if one.state == "open"] or found
        if len(usable) > 1:
            raise ConfigError(f"{word!r} may be any of the tokens {', '.join(one.id for one in usable)}; give one id")
        [token] = usable
        if token.state != "open":
            by = f" by device {token.used_by!r}; `edgefl devices remove` removes it" if token.used_by else ""
            raise ConfigError(f"token {token.id} cannot be revoked: it is {token.state}{by}")
        is_open = tokens.c.used_by.is_(sa.null()) & tokens.c.revoked_s.is_(sa.null())
        with self._engine.begin() as db:
            here = sa.func.substr(tokens.c.secret_sha256, 1, ID_CHARS) == token.id
            if db.execute(tokens.update().where(here & is_open).values(revoked_s=self._clock())).rowcount != 1:
                raise ConfigError(f"token {token.id} was used or revoked a moment ago; list the tokens again")
        return next(one for one in self.list() if one.id == token.id)

    def _shown(self, row: Any) -> TokenRow:
        if row["used_by"] is not None:
            state = "used"
        elif row["revoked_s"] is not None:
            state = "revoked"
        else:
            state = "open" if row["expires_s"] > self._clock() else "expired"
        return TokenRow(
            id=row["secret_sha256"][:ID_CHARS], state=state, label=row["label"], made_s=row["made_s"],
            expires_s=row["expires_s"], used_by=row["used_by"],
        )  # fmt: skip


def check_token_label(label: str | None) -> None:
    """Raise ConfigError for a label that cannot be shown on one line."""
    check_label(label, "--label")
