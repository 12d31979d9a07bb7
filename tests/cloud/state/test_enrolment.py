"""Enrolment: one token, one device, once; whatever is refused changes nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from cloud.state.enrolment import REMOVED, Enrolment
from cloud.state.store import open_database, tokens, updates
from edgefl.errors import ConfigError, EnrolmentRefused, NotFound, ProtocolError
from edgefl.protocols import tls
from edgefl.protocols.tls import Identity
from edgefl.testing import ManualClock


@pytest.fixture
def clock():
    return ManualClock(1_000_000.0)


@pytest.fixture
def enrolment(tmp_path, fleet_ca, clock):
    engine = open_database(tmp_path / "cloud.db")
    yield Enrolment(engine, fleet_ca.folder, clock)
    engine.dispose()


@pytest.fixture
def csr(tmp_path):
    return tls.new_request(Identity.in_folder(tmp_path), "whatever")


def secret_of(token):
    return tls.parse_token(token)[0]


def test_a_token_becomes_a_certificate_of_the_fleets_ca(enrolment, csr, fleet_ca):
    token = enrolment.new_token()
    secret, fingerprint = tls.parse_token(token)
    assert fingerprint == tls.fingerprint(fleet_ca.cloud.ca.read_bytes())
    certificate = enrolment.enroll(secret, "cam-1", {"site": "north"}, csr)
    assert tls.common_name(certificate) == "cam-1"  # whatever the request says
    (device,) = enrolment.devices()
    assert (device.name, device.tags, device.serial) == ("cam-1", {"site": "north"}, tls.serial_number(certificate))
    assert device.enrolled_s == 1_000_000.0


def test_the_secret_itself_is_not_kept(enrolment):
    secret = secret_of(enrolment.new_token())
    with enrolment._engine.connect() as db:
        (row,) = db.execute(tokens.select()).all()
    assert secret not in str(row)
    assert len(secret) >= 43  # 32 bytes


def test_a_used_token_is_refused_and_says_by_whom(enrolment, csr):
    secret = secret_of(enrolment.new_token())
    enrolment.enroll(secret, "a", {}, csr)
    with pytest.raises(
        EnrolmentRefused, match=r"used already, by device 'a'; make a new one with `edgefl cloud token`"
    ):
        enrolment.enroll(secret, "b", {}, csr)
    assert not enrolment.is_known("b")


def test_an_expired_token_is_refused(enrolment, csr, clock):
    secret = secret_of(enrolment.new_token(valid_for_s=60))
    clock.advance(60)
    with pytest.raises(EnrolmentRefused, match=r"expired.*--valid-for"):
        enrolment.enroll(secret, "a", {}, csr)


def test_an_unknown_token_is_refused(enrolment, csr):
    with pytest.raises(EnrolmentRefused, match="unknown to this cloud"):
        enrolment.enroll("x" * 43, "a", {}, csr)


@pytest.mark.parametrize("name", ["", "Cam", "a/b", "+", "cloud", "all", "operator", "a" * 65, ".a"])
def test_an_invalid_name_is_refused_and_the_token_stays_good(enrolment, csr, name):
    secret = secret_of(enrolment.new_token())
    with pytest.raises(EnrolmentRefused, match="is not a valid device name"):
        enrolment.enroll(secret, name, {}, csr)
    enrolment.enroll(secret, "a", {}, csr)


def test_a_taken_name_is_refused_and_the_token_stays_good(enrolment, csr):
    enrolment.enroll(secret_of(enrolment.new_token()), "a", {}, csr)
    serial = enrolment.devices()[0].serial
    secret = secret_of(enrolment.new_token())
    with pytest.raises(EnrolmentRefused, match=r"'a' is enrolled already.*edgefl devices remove a"):
        enrolment.enroll(secret, "a", {}, csr)
    assert enrolment.is_known("a", serial)
    enrolment.enroll(secret, "b", {}, csr)


def test_a_bad_request_is_refused_and_the_token_stays_good(enrolment, csr):
    secret = secret_of(enrolment.new_token())
    with pytest.raises(ProtocolError, match="PKCS"):
        enrolment.enroll(secret, "a", {}, b"no request")
    assert not enrolment.devices()
    enrolment.enroll(secret, "a", {}, csr)


@pytest.mark.parametrize("tags", [{"": "v"}, {"k": "v" * 65}, {f"k{i}": "" for i in range(33)}])
def test_tags_beyond_the_caps_are_refused(enrolment, csr, tags):
    with pytest.raises(EnrolmentRefused, match="tags"):
        enrolment.enroll(secret_of(enrolment.new_token()), "a", tags, csr)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e9])
def test_a_token_is_not_for_ever(enrolment, seconds):
    with pytest.raises(ConfigError, match="at most a year"):
        enrolment.new_token(seconds)


def test_of_many_devices_with_one_token_exactly_one_is_enrolled(enrolment, csr):
    secret = secret_of(enrolment.new_token())

    def enrol(number):
        try:
            return bool(enrolment.enroll(secret, f"d{number}", {}, csr))
        except EnrolmentRefused:
            return False

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(enrol, range(8))) == 1
    assert len(enrolment.devices()) == 1


def test_of_many_devices_with_one_name_exactly_one_is_enrolled(enrolment, csr):
    secrets = [secret_of(enrolment.new_token()) for _ in range(6)]

    def enrol(secret):
        try:
            return bool(enrolment.enroll(secret, "same", {}, csr))
        except EnrolmentRefused as refusal:
            return str(refusal)

    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(enrol, secrets))
    assert answers.count(True) == 1
    assert sum("enrolled already" in str(answer) for answer in answers) == 5


def test_a_removed_device_is_known_no_more_and_its_old_certificate_never_again(enrolment, csr):
    old = tls.serial_number(enrolment.enroll(secret_of(enrolment.new_token()), "a", {}, csr))
    assert enrolment.is_known("a")
    enrolment.remove("a")
    assert not enrolment.is_known("a")
    new = tls.serial_number(enrolment.enroll(secret_of(enrolment.new_token()), "a", {}, csr))
    assert enrolment.is_known("a", new)
    assert not enrolment.is_known("a", old)


def test_removing_a_stranger_says_so(enrolment):
    with pytest.raises(NotFound, match="no device 'ghost'"):
        enrolment.remove("ghost")


def test_what_is_revoked_is_listed_in_order_and_stays_so(enrolment, csr):
    serials = []
    for name in ("b", "a", "b"):
        serials.append(tls.serial_number(enrolment.enroll(secret_of(enrolment.new_token()), name, {}, csr)))
        enrolment.remove(name)
    assert enrolment.revoked() == serials


def test_who_was_removed_lately_is_known_for_a_day_unless_the_name_is_enrolled_again(enrolment, csr, clock):
    for name in ("a", "b"):
        enrolment.enroll(secret_of(enrolment.new_token()), name, {}, csr)
        enrolment.remove(name)
    assert enrolment.removed_lately() == ["a", "b"]
    enrolment.enroll(secret_of(enrolment.new_token()), "a", {}, csr)
    assert enrolment.removed_lately() == ["b"]
    clock.advance(24 * 3600)
    assert enrolment.removed_lately() == []


def test_an_update_of_a_removed_device_that_is_not_folded_is_refused_after_a_restart_too(enrolment, csr):
    enrolment.enroll(secret_of(enrolment.new_token()), "a", {}, csr)
    row = {"job": "j", "round": 1, "file": "f", "weight": 2.0, "metrics": {}, "reason": None}
    with enrolment._engine.begin() as db:
        db.execute(updates.insert(), [row | {"device": name} for name in ("a", "b")])
    enrolment.remove("a")
    with enrolment._engine.begin() as db:
        found = db.execute(updates.select().order_by(updates.c.device)).mappings().all()
    assert [(one["device"], one["file"], one["reason"]) for one in found] == [("a", None, REMOVED), ("b", "f", None)]
