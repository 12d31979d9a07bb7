"""How assignments stand to each other: which replace which, and which a closed round ends."""

from __future__ import annotations

from edgefl.protocols.messages import Assignment, RoundClosed


def queue_key(assignment: Assignment) -> tuple[str, int]:
    """Return an assignment's key in the queue: one key for all training rounds of a job, one for each message."""
    return assignment.job, 0 if assignment.replaces_older else assignment.round


def is_over(assignment: Assignment, closed: RoundClosed) -> bool:
    """Whether a closed round, or the end of its job, ends this assignment."""
    if assignment.job != closed.job:
        return False
    is_older = assignment.replaces_older and assignment.round < closed.round
    return closed.job_ended or assignment.round == closed.round or is_older
