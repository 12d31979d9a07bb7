"""The protocol between the agent and its serving process: one line of JSON per message, over a socket pair.

    process: up {pid}
    agent:   start {log_level, token, tls_home}                         once, before all else
             load {id, name, version, path}                load and warm up, beside what serves
             switch {id} | forget {id}                      what was loaded serves, or is dropped
             drop {name} | ready {ready}
             admit_anew {}                                  clients shake hands again: who may ask has changed
    process: loaded {id, error}                             error is empty where it can serve
             stuck {model}                                  a computation cannot be stopped

No prediction passes here: the process has the listening socket.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgefl.errors import ProtocolError

MAX_LINE_BYTES = 64 << 10
MAX_ERROR_CHARS = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Up:
    """The process has started and serves the port."""

    pid: int
    kind: str = "up"


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """How to serve."""

    log_level: int
    token: str = ""  # that clients have to send; empty = none
    tls_home: str = ""  # the folder whose certificate is shown, and one of its CA is expected; empty = no TLS
    kind: str = "start"


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """Load a model and run it once."""

    id: int
    name: str
    version: int
    path: str
    kind: str = "load"


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """What a `Load` came to."""

    id: int
    error: str = ""
    kind: str = "loaded"


@dataclass(frozen=True, kw_only=True, slots=True)
class Switch:
    """Serve what was loaded, in place of the version before it."""

    id: int
    kind: str = "switch"


@dataclass(frozen=True, kw_only=True, slots=True)
class Forget:
    """Drop what was loaded, or is being loaded."""

    id: int
    kind: str = "forget"


@dataclass(frozen=True, kw_only=True, slots=True)
class Drop:
    """Stop serving this model."""

    name: str
    kind: str = "drop"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """Whether every release of the device has been loaded, or given up."""

    ready: bool
    kind: str = "ready"


@dataclass(frozen=True, kw_only=True, slots=True)
class AdmitAnew:
    """Close all client connections; new ones are checked against the current certificates and revocation list."""

    kind: str = "admit_anew"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stuck:
    """A computation of this model cannot be stopped after its time limit."""

    model: str
    kind: str = "stuck"


Message = Up | Start | Load | Loaded | Switch | Forget | Drop | Ready | AdmitAnew | Stuck
_KINDS: Mapping[str, type[Any]] = {
    "up": Up,
    "start": Start,
    "load": Load,
    "loaded": Loaded,
    "switch": Switch,
    "forget": Forget,
    "drop": Drop,
    "ready": Ready,
    "admit_anew": AdmitAnew,
    "stuck": Stuck,
}


def line(message: Message) -> bytes:
    """Return a message's bytes."""
    return json.dumps(dataclasses.asdict(message)).encode() + b"\n"


def parse(text: bytes) -> Message:
    """Return the message of a line; raises ProtocolError."""
    try:
        value = json.loads(text)
        message: Message = _KINDS[value["kind"]](**value)
    except (ValueError, KeyError, TypeError, RecursionError) as cause:
        raise ProtocolError(f"not a message between agent and serving process: {text[:80]!r}") from cause
    return message
