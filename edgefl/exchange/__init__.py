"""Decides which devices are waited for and which are given up, for rounds, relays and simulations. See `exchange`."""

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
