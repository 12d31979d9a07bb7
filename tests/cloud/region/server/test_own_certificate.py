"""A region's own certificate: renewed when it is due, by a request that proves whose it is, and of a region again."""

from __future__ import annotations

import grpc
import pytest

from cloud.region.server.own_certificate import OwnCertificate
from cloud.state.enrolment import REGION, Enrolment
from cloud.state.store import open_database
from edgefl.errors import CloudUnreachable, EnrolmentRefused, ProtocolError
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols import tls
from edgefl.protocols.certificates.own import NEXT_KEY
from edgefl.protocols.tls import Identity


class Home:
    """The tls folder of region r1, and the cloud that it asks."""

    def __init__(self, ca, folder):
        self.engine = open_database(ca.folder / "cloud.db")
        self.enrolment = Enrolment(self.engine, ca.folder)
        self.folder = folder
        folder.mkdir()
        self.identity = Identity.in_folder(folder)
        self.identity.ca.write_bytes((ca.folder / "ca.pem").read_bytes())
        secret, _ = tls.parse_token(self.enrolment.new_token(role=REGION))
        request = tls.new_request(self.identity, "r1")
        self.identity.cert.write_bytes(self.enrolment.enroll(secret, "r1", {}, request, role=REGION))
        self.passes, self.days = set(), 2000.0  # new ones are valid for longer, so this one is near its end
        self.region = "r1"

    def ask(self, request):
        renewals = self.enrolment.renewals
        renewals._days = 2000.0
        certificate = renewals.renew_for(request, self.region, lambda region, name: (region, name) in self.passes)
        return pb.RenewReply(certificate=certificate, ca=self.identity.ca.read_bytes())

    def own(self, ask=None):
        return OwnCertificate(self.folder, "r1", lambda: self.days, ask or self.ask)


@pytest.fixture
def home(fleet_ca, tmp_path):
    made = Home(fleet_ca, tmp_path / "tls")
    yield made
    made.engine.dispose()


def test_it_is_renewed_when_due_and_the_former_is_revoked_at_first_use(home):
    before, own = home.identity.cert.read_bytes(), home.own()
    assert own.renew()
    after = home.identity.cert.read_bytes()
    assert (tls.common_name(after), tls.is_region(after)) == ("r1", True)
    assert tls.load_certificate(after).public_key() != tls.load_certificate(before).public_key()
    assert (own.take_new(), own.take_new(), own.renew()) == (True, False, False)
    assert home.enrolment.revoked() == []
    assert home.enrolment.is_known("r1", tls.serial_number(after))
    assert home.enrolment.revoked() == [tls.serial_number(before)]
    assert not home.enrolment.is_known("r1", tls.serial_number(before))


@pytest.mark.parametrize("days", [0.0, 397.0])
def test_it_is_left_alone_until_it_is_due(home, days):
    home.days = days  # 0: the parent has not said it yet
    own = home.own(lambda _request: pytest.fail("asked"))
    assert (own.renew(), own.take_new()) == (False, False)


def test_a_region_above_may_pass_the_request_on_and_no_other(home):
    home.region = "other"
    with pytest.raises(ProtocolError, match="region 'other' speaks for 'r1', which may not connect below it"):
        home.own().renew()
    home.passes = {("other", "r1")}
    assert home.own().renew()


def test_an_answer_that_was_lost_is_asked_for_again_with_the_same_key(home):
    keys = []

    def lost(request):
        keys.append(home.ask(request).certificate)
        raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "lost")

    with pytest.raises(CloudUnreachable, match="'r1' was not renewed by its parent: lost"):
        home.own(lost).renew()
    assert (home.folder / NEXT_KEY).exists()
    assert home.own().renew()
    assert home.identity.cert.read_bytes() == keys[0]


def test_a_certificate_of_another_kind_or_a_removed_region_changes_nothing(home, fleet_ca):
    before = home.identity.cert.read_bytes()

    def device(request):
        return pb.RenewReply(certificate=tls.sign_request(fleet_ca.folder, request.csr, "r1"))

    with pytest.raises(ProtocolError, match="the new certificate is a device's"):
        home.own(device).renew()
    home.enrolment.remove("r1")
    with pytest.raises(EnrolmentRefused, match="was replaced or revoked"):
        home.own().renew()
    assert home.identity.cert.read_bytes() == before
