"""How a release is placed: what a device runs of a model, what crosses to a stage server, and what it does without one.

The section is part of the signed manifest, so a device knows the cut, the wire format and the digest of the model that
the tail is of (that of the release's own file) before it computes anything. Of the files a device fetches those that
it uses: with a split, the head and the fall-back, and never the whole model.
Invariant: an `Offload` names each placement once, and what it uses is among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from edgefl.errors import ProtocolError
from edgefl.protocols.addresses import bracketed
from edgefl.protocols.fields import Checked, limited
from edgefl.protocols.messages import MAX_NAME_CHARS, BlobRef

DEVICE, CLOUD, AUTO = "device", "cloud", "auto"
SPLIT = "split:"  # begins the name of a placement at a cut
MAX_PLACEMENTS, MAX_STAGE_SERVERS, MAX_CROSSING = 8, 8, 64
MAX_MS = 1e7
FALLBACK = "fallback"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPart(Checked):
    """A file that a device runs, and the sample that it must compute there."""

    blob: BlobRef
    sample: BlobRef


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement(Checked):
    """One way to divide a model. Times are of the sample's first inputs on the publisher's machine."""

    name: str = field(metadata=limited(max_chars=MAX_NAME_CHARS))  # device, cloud, or split:NODE
    layers: int = field(metadata=limited(least=0))  # on the device
    head: ModelPart | None = None  # what the device runs; None = nothing
    crossing: Sequence[str] = field(default_factory=list, metadata=limited(max_items=MAX_CROSSING))  # in their order
    form: str = field(default="", metadata=limited(max_chars=16))  # wire format; empty = nothing crosses
    device_ms: float = field(default=0.0, metadata=limited(least=0, most=MAX_MS))
    cloud_ms: float = field(default=0.0, metadata=limited(least=0, most=MAX_MS))
    encode_ms: float = field(default=0.0, metadata=limited(least=0, most=MAX_MS))
    decode_ms: float = field(default=0.0, metadata=limited(least=0, most=MAX_MS))
    up_bytes: int = field(default=0, metadata=limited(least=0))
    down_bytes: int = field(default=0, metadata=limited(least=0))
    device_bytes: int = field(default=0, metadata=limited(least=0))  # weights and activations there
    leaves: str = field(default="nothing", metadata=limited(max_chars=16))  # the device: nothing, activations, inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Fallback(Checked):
    """What answers on the device when the cloud does not: a smaller model, or an exit behind the layers of a cut."""

    part: ModelPart
    behind: str = field(default="", metadata=limited(max_chars=MAX_NAME_CHARS))  # the placement; empty = own inputs
    release: str = field(default="", metadata=limited(max_chars=MAX_NAME_CHARS))  # NAME:VERSION that it is; for people


@dataclass(frozen=True, kw_only=True, slots=True)
class Offload(Checked):
    """How a release is placed."""

    use: str = field(metadata=limited(max_chars=MAX_NAME_CHARS))  # auto, or the name of a placement
    placements: Sequence[Placement] = field(metadata=limited(max_items=MAX_PLACEMENTS))
    stages: Sequence[str] = field(
        default_factory=list, metadata=limited(max_items=MAX_STAGE_SERVERS, max_chars=MAX_NAME_CHARS)
    )  # host:port of stage servers, in the order in which they are tried
    fallback: Fallback | None = None
    threshold: float = field(
        default=0.0, metadata=limited(least=0, most=1)
    )  # confidence that needs no cloud; 0 = all do
    objective: str = field(default="latency", metadata=limited(max_chars=32))
    timeout_ms: float = field(default=1000.0, metadata=limited(least=1, most=60_000))  # of a request without its own
    divides: bool = False  # whether rows may be computed apart from each other

    def __post_init__(self) -> None:
        Checked.__post_init__(self)
        names = [one.name for one in self.placements]
        if not names or len(set(names)) < len(names):
            raise ProtocolError(f"Offload: placements are {', '.join(names) or 'none'}; expected each once")
        if self.use != AUTO and self.use not in names:
            raise ProtocolError(f"Offload: use is {self.use!r}, expected {AUTO} or one of: {', '.join(names)}")
        if self.fallback is not None and self.fallback.behind not in {"", *names}:
            raise ProtocolError(f"Offload: the fall-back is behind {self.fallback.behind!r}, which is no placement")
        for one in self.stages:
            split_address(one)

    def placement(self, name: str) -> Placement:
        """Return a placement; raises ProtocolError if the release does not have it."""
        for one in self.placements:
            if one.name == name:
                return one
        known = ", ".join((AUTO, *(one.name for one in self.placements)))
        raise ProtocolError(f"the release has no placement {name!r}; it has: {known}")

    def chosen(self, wish: str, memory_bytes: float) -> list[Placement]:
        """Return the placements among which a device chooses: by its own wish, empty = the release's.

        With `auto`, those whose part fits into the device's memory. Raises ProtocolError if there are none.
        """
        use = wish or self.use
        if use != AUTO:
            return [self.placement(use)]
        found = [one for one in self.placements if one.device_bytes <= memory_bytes]
        if not found:
            least = min(one.device_bytes for one in self.placements)
            raise ProtocolError(
                f"no placement of the release fits into this device's memory for predictions: {memory_bytes:.0f} "
                f"bytes; the smallest needs {least}. Raise --serve-memory-mb, or publish with a smaller head"
            )
        return found

    def parts(self, placements: Sequence[Placement]) -> dict[str, ModelPart]:
        """Return the files that a device needs for these placements, by a name for each."""
        heads = [one for one in placements if one.head is not None]
        if self.fallback is not None and self.fallback.behind:
            heads.append(self.placement(self.fallback.behind))
        found = {head_name(one.layers): one.head for one in heads if one.head is not None}
        if self.fallback is not None:
            found[FALLBACK] = self.fallback.part
        return found

    def all_parts(self) -> Mapping[str, ModelPart]:
        """Return every file of the section, by the same names."""
        return self.parts(self.placements)


def head_name(layers: int) -> str:
    """Return the name of the part with so many layers, as devices store it."""
    return f"head-{layers}"


def split_address(text: str) -> tuple[str, int]:
    """Return host and port of `host:port`; raises ProtocolError."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ProtocolError(f"{text[:80]!r} is no address of a stage server; expected HOST:PORT, such as 10.0.0.1:9450")
    return bracketed(host.strip("[]")), int(port)
