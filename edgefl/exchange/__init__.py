"""Decides which devices are waited for and which are given up, for rounds, relays and simulations. See `exchange`."""

from edgefl.exchange.durations import Durations, Expectation
from edgefl.exchange.events import (
    Admitted,
    Announce,
    Answered,
    Back,
    Begin,
    Close,
    Event,
    Failed,
    GiveUp,
    GiveUpReason,
    Instruction,
    Joined,
    Offline,
    Paused,
    Resumed,
    Stop,
    Tick,
    Withdrawn,
    Yield,
)
from edgefl.exchange.exchange import Exchange
from edgefl.exchange.terms import Terms, cohort_size, gathering

__all__ = [
    "Admitted",
    "Announce",
    "Answered",
    "Back",
    "Begin",
    "Close",
    "Durations",
    "Event",
    "Exchange",
    "Expectation",
    "Failed",
    "GiveUp",
    "GiveUpReason",
    "Instruction",
    "Joined",
    "Offline",
    "Paused",
    "Resumed",
    "Stop",
    "Terms",
    "Tick",
    "Withdrawn",
    "Yield",
    "cohort_size",
    "gathering",
]  # fmt: skip
