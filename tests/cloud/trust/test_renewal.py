"""Renewal: when it is due by the cloud's clock, and which certificate counts from when."""

import datetime
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from cloud.state.enrolment import Enrolment
from cloud.state.store import devices, open_database
from cloud.trust.renewal import AGAIN_S
from edgefl.errors import EnrolmentRefused, ProtocolError
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols import tls
from edgefl.protocols.tls import Identity
from edgefl.testing import ManualClock

NOW_S = 1_800_000_000.0  # 2027
DAY_S = 86400


@pytest.fixture
def clock():
    return ManualClock(NOW_S)


@pytest.fixture
def enrolment(tmp_path, fleet_ca, clock):
    engine = open_database(tmp_path / "cloud.db")
    yield Enrolment(engine, fleet_ca.folder, clock)
    engine.dispose()


@pytest.fixture
def csr(tmp_path):
    """`csr(name)`: the signing request of a key of that name."""

    def make(name):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return tls.request_for(tls.saved_key(folder / "key.pem"), "whatever")

    return make


@pytest.fixture
def enrolled(enrolment, csr):
    """The serial number of device a's first certificate."""
    secret, _ = tls.parse_token(enrolment.new_token())
    return tls.serial_number(enrolment.enroll(secret, "a", {}, csr("first")))


def serial_of_next(enrolment, csr, name="second"):
    return tls.serial_number(enrolment.renewals.renew("a", csr(name)))


def test_both_count_until_the_new_one_is_used_and_then_it_alone(enrolment, csr, enrolled):
    second = serial_of_next(enrolment, csr)
    assert enrolment.is_known("a", enrolled)
    assert enrolment.revoked() == []
    assert enrolment.is_known("a", second)
    assert not enrolment.is_known("a", enrolled)
    assert enrolment.is_known("a", second)
    assert enrolment.revoked() == [enrolled]
    assert [device.serial for device in enrolment.devices()] == [second]


def test_a_request_that_comes_again_gets_the_same_certificate(enrolment, csr, enrolled):
    assert enrolment.renewals.renew("a", csr("second")) == enrolment.renewals.renew("a", csr("second"))


def test_a_request_for_another_key_takes_the_unused_ones_place_but_not_too_often(enrolment, csr, enrolled, clock):
    second = serial_of_next(enrolment, csr)
    with pytest.raises(EnrolmentRefused, match="allowed 3600 s after"):
        serial_of_next(enrolment, csr, "third")
    clock.advance(AGAIN_S)
    third = serial_of_next(enrolment, csr, "third")
    assert enrolment.revoked() == [second]
    assert not enrolment.is_known("a", second)
    assert enrolment.is_known("a", third)


def test_a_removed_device_loses_its_next_certificate_too(enrolment, csr, enrolled):
    second = serial_of_next(enrolment, csr)
    enrolment.remove("a")
    assert enrolment.revoked() == [enrolled, second]
    assert not enrolment.is_known("a", second)
    with pytest.raises(EnrolmentRefused, match="no device 'a'"):
        enrolment.renewals.renew("a", csr("third"))


def test_nobody_uses_the_next_certificate_of_another(enrolment, csr, enrolled):
    second = serial_of_next(enrolment, csr)
    secret, _ = tls.parse_token(enrolment.new_token())
    enrolment.enroll(secret, "b", {}, csr("b"))
    assert not enrolment.is_known("b", second)
    assert enrolment.is_known("a", enrolled)


def test_what_is_no_request_changes_nothing(enrolment, csr, enrolled):
    for _ in range(2):
        with pytest.raises(ProtocolError, match="PKCS #10"):
            enrolment.renewals.renew("a", b"no request")
        serial_of_next(enrolment, csr)


@pytest.mark.parametrize(("days_left", "due"), [(-1, True), (132, True), (133, False), (5000, False)])
def test_it_is_due_with_a_third_of_the_lifetime_left_by_the_clouds_clock(
    enrolment, fleet_ca, tmp_path, monkeypatch, days_left, due, clock
):
    monkeypatch.setattr(tls, "_WRITTEN", datetime.datetime.fromtimestamp(NOW_S, datetime.UTC))
    certificate = tls.sign_request(fleet_ca.folder, tls.new_request(Identity.in_folder(tmp_path), "a"), "a", days_left)
    assert enrolment.renewals.is_due(certificate) is due
    clock.now_s = 0.0  # a cloud in 1970 renews nothing
    assert not enrolment.renewals.is_due(certificate)


def test_one_that_begins_late_is_due(enrolment, fleet_ca, tmp_path, monkeypatch):
    monkeypatch.setattr(tls, "BEGIN", datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC))
    certificate = tls.sign_request(fleet_ca.folder, tls.new_request(Identity.in_folder(tmp_path), "a"), "a", 3000)
    assert enrolment.renewals.is_due(certificate)


def test_the_data_plane_says_when_and_gives_the_certificate(plane, csr):
    with plane.engine.begin() as db:
        db.execute(devices.insert().values(name="a", serial="1", tags={}, enrolled_s=0.0))
    stub = plane.stub("a")
    assert not stub.Next(pb.NextRequest(), timeout=10).renew
    with pytest.raises(grpc.RpcError, match="FAILED_PRECONDITION"):
        stub.Renew(pb.RenewRequest(csr=csr("a")), timeout=10)
    plane.renewals._days = 4000.0
    assert stub.Next(pb.NextRequest(), timeout=10).renew
    with pytest.raises(grpc.RpcError, match="PKCS #10"):
        stub.Renew(pb.RenewRequest(csr=b"no request"), timeout=10)
    reply = stub.Renew(pb.RenewRequest(csr=csr("a")), timeout=10)
    assert tls.common_name(reply.certificate) == "a"
    assert reply.ca == (plane.folder / "ca.pem").read_bytes()
    assert plane.renewals.first_use("a", tls.serial_number(reply.certificate))


def test_of_many_first_uses_at_once_each_counts_and_one_revokes(enrolment, csr, enrolled):
    second = serial_of_next(enrolment, csr)
    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(lambda _: enrolment.is_known("a", second), range(32)))
        assert not any(threads.map(lambda _: enrolment.is_known("a", enrolled), range(8)))
    assert enrolment.revoked() == [enrolled]
