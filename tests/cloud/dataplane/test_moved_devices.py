"""Devices that change their parent during a round: whose updates are taken where, and who is waited for."""

import grpc
import pytest

from cloud.dataplane.grpc_fleet import FleetDependencies, GrpcFleet
from edgefl.config import JobConfig
from edgefl.exchange import Announce
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols.messages import Fit
from edgefl.settings.server import TiersConfig
from tests.cloud.dataplane.rounds import FakeLink
from tests.cloud.dataplane.test_fleet_service import Status, update_bytes
from tests.cloud.dataplane.test_grpc_fleet import PARAMETERS, centre

__all__ = ["centre"]  # the fixture


@pytest.mark.parametrize("is_region", [False, True])
def test_an_update_that_began_with_another_model_is_no_answer_and_its_device_trains_again(plane, is_region):
    """With regional rounds, rounds of two regions have one number and two models; the device has moved between."""
    plane.is_region = is_region
    stub, data = plane.stub("a"), update_bytes()
    other = pb.UpdateKey(job=plane.job, round=1, model="1" * 64)
    state = plane.upload(stub, data, key=other)
    assert (state.status, state.reason) == (Status.STALE, "it was trained from another model than this round's")
    assert stub.Resume(other).status == Status.STALE
    stub.Fail(pb.FailureReport(key=other, reason="no disk"))  # nor is its failure
    assert len(stub.Next(pb.NextRequest(knows=["fit"])).assignments) == 1
    key = pb.UpdateKey(job=plane.job, round=1, model=plane.model.sha256)
    assert plane.upload(stub, data, key=key).status == Status.STORED


def test_a_device_that_cannot_answer_at_this_parent_is_not_asked_and_keeps_its_update(plane):
    plane.round.unreachable, plane.round.region_rounds = lambda region: "" if region else "it needs a region", 2
    stub, data = plane.stub("a"), update_bytes()
    assert not stub.Next(pb.NextRequest(knows=["fit"])).assignments
    for call in (lambda: plane.upload(stub, data), lambda: stub.Resume(pb.UpdateKey(job=plane.job, round=1))):
        with pytest.raises(grpc.RpcError, match="it needs a region") as refused:
            call()
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    with pytest.raises(grpc.RpcError, match="it needs a region"):  # the second regional round
        stub.Resume(pb.UpdateKey(job=plane.job, round=2))
    assert stub.Resume(pb.UpdateKey(job=plane.job, round=3)).status == Status.STALE  # of another round of the cloud
    stub.Fail(pb.FailureReport(key=pb.UpdateKey(job=plane.job, round=1), reason="no disk"))
    assert plane.round.waits_for("a")


def test_a_device_at_a_parent_where_it_cannot_answer_is_away_until_it_has_another(centre):
    """It has no region, and regional rounds are those of regions; nor is it waited for until the deadline."""
    centre.fleet()
    config = JobConfig(tiers=TiersConfig(region_rounds=2))
    job = centre.jobs.submit("t:t", centre.blobs.put(b"zip"), centre.blobs.put_tree(PARAMETERS), (), config)
    link = FakeLink()
    places = {"a": "oslo"}
    link.via = lambda device: places.get(device, "")
    deps = FleetDependencies(centre.rounds, centre.jobs, centre.blobs, centre.spool, link)
    fleet = GrpcFleet(centre.jobs.load(job), deps)
    opened = fleet._open(centre.plan(job=job))
    assert opened.waiting() == {"a", "b"}
    assert (opened.unreachable("oslo"), "needs a region" in opened.unreachable("")) == ("", True)
    seen = fleet._presence()
    assert (seen.online, seen.offline) == ({"a"}, {"b"})
    fleet._execute(Announce("a"), opened)
    fleet._execute(Announce("b"), opened)
    assert [device for device, message in link.told if isinstance(message, Fit)] == ["a"]
    places["b"] = "oslo"
    assert fleet._presence().online == {"a", "b"}
    fleet.leave()
    centre.rounds.remove(opened)
