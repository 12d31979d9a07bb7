"""Which assignments replace each other, which a closed round ends, and which parameters one begins with."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from edge_agent.training.queue_rules import goes_on_beside, is_given_up, is_over, parameters_of, queue_key
from edgefl.config import TrainConfig
from edgefl.protocols.messages import BlobRef, Fit, RoundClosed, Signed


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


def fit(number, *, takes_late=True):
    blob = BlobRef(sha256="0" * 64, size=1)
    return Fit(
        job="j", round=number, model=blob, model_blake3="00", bundle=Signed(text="", key_id="", signature=""),
        train=TrainConfig(), deadline_s=1.0, max_update_bytes=10, takes_late=takes_late,
    )  # fmt: skip


def test_a_training_goes_on_beside_the_next_round_alone_if_that_takes_it():
    assert [goes_on_beside(fit(1), fit(number)) for number in (1, 2, 3)] == [False, True, False]
    assert not goes_on_beside(fit(1, takes_late=False), fit(2))
    assert not goes_on_beside(fit(1), asked(2))  # an evaluation after the last round


def test_a_training_is_not_given_up_because_its_round_is_not_open():
    assert not is_given_up(fit(1), [])
    assert not is_given_up(fit(1), [fit(2), asked(7, job="k")])
    assert is_given_up(fit(1), [fit(3)])
    for one in (fit(1, takes_late=False), asked(1)):
        assert is_given_up(one, [])
        assert is_given_up(one, [fit(2)])
        assert not is_given_up(one, [fit(1)])


def test_a_fragment_is_fetched_only_after_a_round_whose_state_is_here():
    part = BlobRef(sha256="1" * 64, size=1)
    parted = replace(fit(3), fragment=part, fragment_blake3="11")
    whole = (parted.model, "00")
    assert parameters_of(parted, lambda job, number: (job, number) == ("j", 2)) == (part, "11")
    assert parameters_of(parted, lambda _job, number: number == 1) == whole  # it has missed round 2
    assert parameters_of(fit(3), lambda _job, _number: True) == whole
    assert set(parted.blobs()) == {parted.model, part}
    assert fit(3).blobs() == (parted.model,)
