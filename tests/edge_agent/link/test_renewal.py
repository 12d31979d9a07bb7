"""The agent's certificate is renewed, or stays as it was and the log says why."""

import asyncio
import datetime

import grpc
import pytest

from edge_agent.link.channel import CloudChannel
from edge_agent.link.profile import load_profile
from edge_agent.link.renewal import Renewal
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols import tls
from edgefl.protocols.certificates.own import NEXT_KEY
from edgefl.protocols.tls import Identity


def renew(home, times=1):
    """Renew a home's certificate; return whether each attempt did, and how often the MQTT link was to reconnect."""
    reconnects = []

    async def inside():
        channel = CloudChannel(load_profile(home), home)
        try:
            async with asyncio.timeout(30):
                renewal = Renewal(home, "cam-1", channel, lambda: reconnects.append(1))
                done = [await renewal.renew() for _ in range(times)]
                await channel.next("0.1")  # over the connection that is in use now
        finally:
            await channel.close()
        return done

    return asyncio.run(inside()), len(reconnects)


def pair(home):
    identity = Identity.in_folder(home)
    return identity.key.read_bytes(), identity.cert.read_bytes()


def test_a_new_key_gets_a_certificate_and_both_are_used(fleet, home):
    before = pair(home)
    assert renew(home) == ([True], 1)
    key, certificate = pair(home)
    assert key != before[0]
    assert tls.common_name(certificate) == "cam-1"
    assert not (home / NEXT_KEY).exists()
    assert fleet.serials[-1] == tls.serial_number(certificate) != tls.serial_number(before[1])


def test_an_answer_that_was_lost_is_asked_for_again_with_the_same_key(fleet, home):
    answers = iter([ConnectionError("lost"), None])
    requests = []

    def answer(csr):
        requests.append(csr)
        if next(answers) is not None:
            raise ConnectionError("lost")
        return pb.RenewReply(certificate=tls.sign_request(fleet.folder, csr, "cam-1"))

    fleet.renew = answer
    assert renew(home, times=2) == ([False, True], 1)
    first, second = (tls.x509.load_pem_x509_csr(one).public_key() for one in requests)
    assert first == second


def damaged(fleet, strange_ca, kind, csr):
    """A reply that must not be taken."""
    if kind == "another name":
        return pb.RenewReply(certificate=tls.sign_request(fleet.folder, csr, "cam-2"))
    if kind == "another CA":
        return pb.RenewReply(certificate=tls.sign_request(strange_ca.folder, csr, "cam-1"))
    if kind == "another key":
        other = tls.new_request(Identity.in_folder(strange_ca.folder / "devices"), "cam-1")
        return pb.RenewReply(certificate=tls.sign_request(fleet.folder, other, "cam-1"))
    return pb.RenewReply(certificate=b"no certificate")


@pytest.mark.parametrize("kind", ["another name", "another CA", "another key", "no certificate"])
def test_what_the_cloud_must_not_send_changes_nothing(fleet, home, strange_ca, kind, caplog):
    (strange_ca.folder / "devices").mkdir()
    fleet.renew = lambda csr: damaged(fleet, strange_ca, kind, csr)
    before = pair(home)
    assert renew(home) == ([False], 0)
    assert pair(home) == before
    assert "certificate.not_renewed" in caplog.text


def test_a_full_disk_leaves_the_old_pair(fleet, home, monkeypatch, caplog):
    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edgefl.protocols.certificates.own.replace_pair", full)
    before = pair(home)
    assert renew(home) == ([False], 0)
    assert pair(home) == before
    assert "No space left" in caplog.text


def test_a_cloud_that_refuses_is_told_in_the_log(fleet, home, caplog):
    fleet.refusal = grpc.StatusCode.FAILED_PRECONDITION, "good for a long time yet"
    assert renew(home) == ([False], 0)
    assert "good for a long time yet" in caplog.text


def test_the_cas_new_certificate_is_taken_for_the_same_key_alone(fleet, home, strange_ca, monkeypatch):
    key = tls.load_ca(fleet.folder)[1]
    monkeypatch.setattr(tls, "NO_END", datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC))
    again = tls.self_signed(key, tls.load_ca(fleet.folder)[0].subject)
    fleet.renew = lambda csr: pb.RenewReply(certificate=tls.sign_request(fleet.folder, csr, "cam-1"), ca=again)
    assert renew(home) == ([True], 1)
    assert (home / "ca.pem").read_bytes() == again
    fleet.renew = lambda csr: pb.RenewReply(
        certificate=tls.sign_request(fleet.folder, csr, "cam-1"), ca=strange_ca.cloud.ca.read_bytes()
    )
    renew(home)
    assert (home / "ca.pem").read_bytes() == again
