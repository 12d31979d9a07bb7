"""Rules about assignments: which replace which, which a closed round ends, and which parameters one begins with."""

from __future__ import annotations

from collections.abc import Callable, Collection

from edgefl.protocols.messages import Assignment, BlobRef, Evaluate, Fit, RoundClosed


def queue_key(assignment: Assignment) -> tuple[str, int]:
    """Return an assignment's key in the queue: one key for all training rounds of a job, one for each message."""
    return assignment.job, 0 if assignment.replaces_older else assignment.round


def is_over(assignment: Assignment, closed: RoundClosed) -> bool:
    """Whether a closed round, or the end of its job, ends this assignment."""
    if assignment.job != closed.job:
        return False
    is_older = assignment.replaces_older and assignment.round < closed.round
    return closed.job_ended or assignment.round == closed.round or is_older


def goes_on_beside(running: Assignment, newer: Assignment) -> bool:
    """Whether a running training is finished although a newer round of its job has begun: that one takes its update."""
    return (
        isinstance(running, Fit) and running.takes_late and isinstance(newer, Fit) and newer.round == running.round + 1
    )


def is_given_up(running: Assignment, still_open: Collection[Assignment]) -> bool:
    """Whether nobody waits for a running assignment any more, as far as the answer to `Next` tells.

    A training whose update may be late is not listed; it goes on unless another round than the next is open.
    """
    if any((one.job, one.round) == (running.job, running.round) for one in still_open):
        return False
    if not isinstance(running, Fit) or not running.takes_late:
        return True
    return any(one.job == running.job and not goes_on_beside(running, one) for one in still_open)


def parameters_of(assignment: Fit | Evaluate, has_state: Callable[[str, int], bool]) -> tuple[BlobRef, str]:
    """Return the blob of the parameters that a device lacks, and its BLAKE3 hash.

    That is what has changed since the round before, if the device has what it kept after that, else the whole model.
    """
    fragment = assignment.fragment if isinstance(assignment, Fit) else None
    if isinstance(assignment, Fit) and fragment is not None and has_state(assignment.job, assignment.round - 1):
        return fragment, assignment.fragment_blake3
    return assignment.model, assignment.model_blake3
