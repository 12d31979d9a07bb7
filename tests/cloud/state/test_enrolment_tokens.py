"""Tokens as operators see them: by id, never the secret; a revoked one enrols nobody."""

from __future__ import annotations

import pytest

from cloud.state.enrolment import Enrolment
from cloud.state.enrolment_tokens import ID_CHARS, EnrolmentTokens
from cloud.state.store import open_database
from edgefl.errors import ConfigError, EnrolmentRefused, NotFound
from edgefl.protocols import tls
from edgefl.protocols.tls import Identity
from edgefl.testing import ManualClock


@pytest.fixture
def clock():
    return ManualClock(1000.0)


@pytest.fixture
def enrolment(tmp_path, clock):
    tls.create_ca(tmp_path)
    engine = open_database(tmp_path / "cloud.db")
    yield Enrolment(engine, tmp_path, clock), EnrolmentTokens(engine, clock)
    engine.dispose()


def enrol(admission, token, folder, name="cam-1"):
    secret, _ = tls.parse_token(token)
    admission.enroll(secret, name, {}, tls.new_request(Identity.in_folder(folder), name))


def test_the_states_of_tokens_the_newest_first(enrolment, clock, tmp_path):
    admission, tokens = enrolment
    used = admission.new_token(50, "for cam-1")
    clock.advance(1)
    admission.new_token(10)
    clock.advance(1)
    opened = admission.new_token(50)
    (tmp_path / "device").mkdir()
    enrol(admission, used, tmp_path / "device")
    clock.advance(20)
    rows = tokens.list()
    assert [(one.state, one.label, one.used_by, one.made_s) for one in rows] == [
        ("open", None, None, 1002.0), ("expired", None, None, 1001.0), ("used", "for cam-1", "cam-1", 1000.0),
    ]  # fmt: skip
    assert {len(one.id) for one in rows} == {ID_CHARS}
    assert not any(secret in repr(rows) for secret in (tls.parse_token(used)[0], tls.parse_token(opened)[0]))


def test_a_revoked_token_enrols_nobody(enrolment, tmp_path):
    admission, tokens = enrolment
    token = admission.new_token(50, "lost")
    assert admission.has_open_tokens()
    assert tokens.revoke("lost").state == "revoked"
    assert not admission.has_open_tokens()
    (tmp_path / "device").mkdir()
    with pytest.raises(EnrolmentRefused, match="the token was revoked"):
        enrol(admission, token, tmp_path / "device")
    with pytest.raises(ConfigError, match="cannot be revoked: it is revoked"):
        tokens.revoke("lost")


def test_a_token_that_was_used_says_by_whom(enrolment, tmp_path):
    admission, tokens = enrolment
    token = admission.new_token(50)
    (tmp_path / "device").mkdir()
    enrol(admission, token, tmp_path / "device")
    with pytest.raises(ConfigError, match="it is used by device 'cam-1'; `edgefl devices remove`"):
        tokens.revoke(tokens.list()[0].id)


def test_a_word_for_none_or_several_tokens(enrolment):
    admission, tokens = enrolment
    for _ in "ab":
        admission.new_token(50, "batch")
    for word in ("", "zz"):
        with pytest.raises(NotFound):
            tokens.revoke(word)
    with pytest.raises(ConfigError, match="may be any of the tokens"):
        tokens.revoke("batch")
    first, second = tokens.list()
    tokens.revoke(first.id[:8])
    assert tokens.revoke("batch").id == second.id  # the only one of this label that is open


def test_a_label_that_cannot_be_shown_makes_no_token(enrolment):
    admission, tokens = enrolment
    with pytest.raises(ConfigError, match="--label"):
        admission.new_token(50, "a\nb")
    assert tokens.list() == []
