"""Who is waited for, and who is given up: decided here alone, for rounds, relays and virtual time. See `exchange`."""

from edgefl.exchange.events import (
    Answered,
    Back,
    Begin,
    Close,
    Event,
    Failed,
    GiveUp,
    Instruction,
    Offline,
    Paused,
    Resumed,
    Stop,
    Tell,
    Tick,
    Why,
    Withdrawn,
    Yield,
)
from edgefl.exchange.exchange import Exchange
from edgefl.exchange.terms import Terms, cohort_size, gathering

__all__ = [
    "Answered", "Back", "Begin", "Close", "Event", "Exchange", "Failed", "GiveUp", "Instruction", "Offline", "Paused",
    "Resumed", "Stop", "Tell", "Terms", "Tick", "Why", "Withdrawn", "Yield", "cohort_size", "gathering",
]  # fmt: skip
