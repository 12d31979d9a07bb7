"""Which assignments replace each other, and which a closed round ends."""

from __future__ import annotations

from types import SimpleNamespace

from edge_agent.training.queue_rules import is_over, queue_key
from edgefl.protocols.messages import RoundClosed


def asked(number, *, replaces_older=True, job="j"):
    return SimpleNamespace(job=job, round=number, replaces_older=replaces_older)


def test_rounds_of_a_job_share_a_place_and_messages_do_not():
    assert queue_key(asked(1)) == queue_key(asked(2))
    assert queue_key(asked(1, replaces_older=False)) != queue_key(asked(2, replaces_older=False))


def test_a_closed_round_ends_itself_and_older_ones():
    closed = RoundClosed(job="j", round=2, job_ended=False)
    assert [is_over(asked(number), closed) for number in (1, 2, 3)] == [True, True, False]
    assert [is_over(asked(number, replaces_older=False), closed) for number in (1, 2)] == [False, True]
    assert not is_over(asked(2, job="k"), closed)
    assert is_over(asked(9), RoundClosed(job="j", round=2, job_ended=True))
