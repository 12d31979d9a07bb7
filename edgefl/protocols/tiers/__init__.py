"""The protocol between a region and its parent. See `records` for what they tell each other."""

from edgefl.protocols.manifest import MAX_PARENTS
from edgefl.protocols.tiers.records import (
    MAX_DEVICES,
    RECEIVES,
    LogSent,
    Member,
    Message,
    MessageReply,
    RegionPart,
    RegionState,
    SumNote,
    Work,
    pack,
    unpack,
)

__all__ = [
    "MAX_DEVICES",
    "MAX_PARENTS",
    "RECEIVES",
    "LogSent",
    "Member",
    "Message",
    "MessageReply",
    "RegionPart",
    "RegionState",
    "SumNote",
    "Work",
    "pack",
    "unpack",
]
