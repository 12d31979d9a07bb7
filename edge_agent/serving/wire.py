"""The protocol between the agent and its serving process: one line of JSON per message, over a socket pair.

    process: up {pid}
    agent:   start {log_level, token, tls_home, tail, generation}   first message, sent once
             load {id, name, version, path, sample, placed} load and warm up; models being served are not affected
             switch {id} | forget {id}              serve the loaded model, or unload it
             drop {name} | ready {ready}
             generation {address}                   where texts are generated from now on
             admit_anew {}                          disconnect all clients, because access rights have changed
    process: loaded {id, error}                     the error is empty if the model can serve
             stuck {model}                          a computation cannot be stopped
             placed {model, version, facts, profile_ms}  how a model is placed, whenever that has changed

Predictions do not pass here: the process has the listening socket.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgefl.errors import ProtocolError

MAX_LINE_BYTES = 64 << 10
MAX_ERROR_CHARS = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingUp:
    """The process has started and serves the port."""

    pid: int
    kind: str = "up"


@dataclass(frozen=True, kw_only=True, slots=True)
class TailAccess:
    """How stage servers are reached."""

    home: str = ""  # with the device's certificate; empty = no TLS
    device: str = ""
    addresses: Sequence[str] = ()  # host:port; empty = those of the release


@dataclass(frozen=True, kw_only=True, slots=True)
class StartServing:
    """Start serving with these settings."""

    log_level: int
    token: str = ""  # that clients must send; empty = none
    tls_home: str = ""  # home with the certificate to present and the CA of clients; empty = no TLS
    tail: Mapping[str, Any] = field(default_factory=dict)  # a `TailAccess`
    generation: str = ""  # address of the generation process; empty = there is none
    kind: str = "start"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadModel:
    """Load a model and run it."""

    id: int
    name: str
    version: int
    path: str
    sample: str = ""  # path of the release's sample; empty = it has none
    placed: str = ""  # of a placed release: a `PlacedFile` as JSON
    kind: str = "load"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLoaded:
    """The result of a `LoadModel`."""

    id: int
    error: str = ""
    kind: str = "loaded"


@dataclass(frozen=True, kw_only=True, slots=True)
class SwitchModel:
    """Serve the loaded model instead of the previous version."""

    id: int
    kind: str = "switch"


@dataclass(frozen=True, kw_only=True, slots=True)
class ForgetModel:
    """Unload a model that was loaded or is being loaded."""

    id: int
    kind: str = "forget"


@dataclass(frozen=True, kw_only=True, slots=True)
class DropModel:
    """Stop serving this model."""

    name: str
    kind: str = "drop"


@dataclass(frozen=True, kw_only=True, slots=True)
class SetReady:
    """Whether every installed release has been loaded or has failed."""

    ready: bool
    kind: str = "ready"


@dataclass(frozen=True, kw_only=True, slots=True)
class SetGeneration:
    """Where the generation process listens from now on; empty = there is no language model."""

    address: str
    kind: str = "generation"


@dataclass(frozen=True, kw_only=True, slots=True)
class DisconnectClients:
    """Close all client connections; new ones are checked against the current certificates and revocation list."""

    kind: str = "admit_anew"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelStuck:
    """A computation of this model cannot be stopped after its time limit."""

    model: str
    kind: str = "stuck"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementNote:
    """How a model is placed now, and what it measured."""

    model: str
    version: int
    facts: Mapping[str, Any]  # see `edge_agent.placement.keeper`; empty = it is served whole, here
    profile_ms: Mapping[str, float]  # by placement: one run on the sample's first inputs, of what runs here
    kind: str = "placed"


Message = (
    ServingUp
    | StartServing
    | LoadModel
    | ModelLoaded
    | SwitchModel
    | ForgetModel
    | DropModel
    | SetReady
    | SetGeneration
    | DisconnectClients
    | ModelStuck
    | PlacementNote
)
_KINDS: Mapping[str, type[Any]] = {
    "up": ServingUp,
    "start": StartServing,
    "load": LoadModel,
    "loaded": ModelLoaded,
    "switch": SwitchModel,
    "forget": ForgetModel,
    "drop": DropModel,
    "ready": SetReady,
    "generation": SetGeneration,
    "admit_anew": DisconnectClients,
    "stuck": ModelStuck,
    "placed": PlacementNote,
}


def line(message: Message) -> bytes:
    """Encode a message as one line."""
    return json.dumps(dataclasses.asdict(message)).encode() + b"\n"


def parse(text: bytes) -> Message:
    """Decode a line; raises ProtocolError."""
    try:
        value = json.loads(text)
        message: Message = _KINDS[value["kind"]](**value)
    except (ValueError, KeyError, TypeError, RecursionError) as cause:
        raise ProtocolError(f"not a message between agent and serving process: {text[:80]!r}") from cause
    return message
