"""Who calls: named by the certificate, refused with what to do; by the real service over TLS."""

import grpc
import pytest

from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols import fleet_pb2_grpc as rpc
from edgefl.protocols import tls


@pytest.mark.parametrize(
    ("domain", "name", "why"),
    [
        (tls.REGION_DOMAIN, "a", "is that of a region; this call is for a device's. Enrol with a token for a device"),
        (tls.DEVICE_DOMAIN, "stranger", "is not enrolled, or not with this certificate; enrol it with a new token"),
    ],
)
def test_who_is_refused_and_why(plane, domain, name, why):
    identity = plane.identity(f"caller-{name}")
    identity.cert.write_bytes(tls.sign_request(plane.folder, tls.new_request(identity, name), name, domain=domain))
    credentials = tls.grpc_channel_credentials(identity)
    with (
        grpc.secure_channel(f"localhost:{plane.port}", credentials) as channel,
        pytest.raises(grpc.RpcError) as refused,
    ):
        rpc.FleetStub(channel).Next(pb.NextRequest(), timeout=10)
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert why in refused.value.details()


def test_a_region_that_cannot_ask_its_parent_does_not_say_that_a_stranger_is_not_enrolled(plane):
    """It may have been enrolled meanwhile, and a region that is refused for good stops."""
    plane.unsure = "no connection to the cloud"
    with pytest.raises(grpc.RpcError) as refused:
        plane.stub("stranger").Next(pb.NextRequest(), timeout=10)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    said = "does not know device 'stranger', and cannot ask its parent: no connection to the cloud"
    assert said in refused.value.details()
    plane.stub("a").Next(pb.NextRequest(), timeout=10)


def test_a_certificate_of_another_ca_does_not_get_in(plane, strange_ca):
    with pytest.raises(grpc.RpcError) as refused:
        plane.stub("a", ca_folder=strange_ca.folder).Next(pb.NextRequest(), timeout=10)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_who_is_known_is_served_and_paced_by_certificate(plane):
    plane.stub("a").Next(pb.NextRequest(), timeout=10)
    assert [who.split()[0] for who in plane.paced] == ["a"]
