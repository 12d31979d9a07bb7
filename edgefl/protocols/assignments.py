"""Assignments on the data plane: `Assignment` of fleet.proto, whose oneof names the kind; the record travels as JSON.

The same JSON travels by MQTT. Invariant: an agent gets no kind that it does not know.
"""

from __future__ import annotations

from edgefl.errors import ProtocolError
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols.messages import ASSIGNMENTS, Assignment, Evaluate, Fit, decode, encode

UPDATE_AGENT = "update the agent: pip install --upgrade edgefl-fleet"


def pack(assignment: Assignment) -> pb.Assignment:
    """Return an assignment as it travels; raises ProtocolError where it is too large."""
    return pb.Assignment(**{assignment.kind: encode(assignment)})


def unpack(reply: pb.NextReply) -> list[Assignment]:
    """Return what a device is asked by `Next`; raises ProtocolError for what it cannot know or is no assignment."""
    if reply.plans:
        raise ProtocolError("the cloud is older than this agent and does not say what kind of work it asks; update it")
    return [_unpacked(packed) for packed in reply.assignments]


def _unpacked(packed: pb.Assignment) -> Assignment:
    kind = packed.WhichOneof("asked")
    if kind is None:
        raise ProtocolError(f"the cloud asks for work that this agent does not know; {UPDATE_AGENT}")
    assignment = decode(ASSIGNMENTS[kind], getattr(packed, kind))
    if assignment.kind != kind:
        raise ProtocolError(f"an assignment of kind {kind} says that it is {assignment.kind!r:.100}")
    return assignment


def model_of(assignment: Assignment) -> str:
    """Return the SHA-256 of the model with which an assignment begins; empty if it has none."""
    return assignment.model.sha256 if isinstance(assignment, Fit | Evaluate) else ""
