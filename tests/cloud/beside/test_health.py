"""Readiness over real gRPC is in test_service.py; here: what is asked of a service."""

from __future__ import annotations

import asyncio

import pytest

from cloud.beside.health import HealthCalls
from edgefl.protocols.inference import open_inference_grpc_pb2 as pb


class Callers:
    async def any(self, context):
        if context == "stranger":
            raise PermissionError("who is it?")
        return "cam"


class Service(HealthCalls):
    _extensions = ("sequence",)
    reason = ""

    def _reason(self):
        return self.reason

    async def _find(self, name, version, context):
        if (name, version) != ("tiny", "1"):
            raise LookupError(name)


def test_ready_is_the_service_s_reason_and_strangers_learn_nothing() -> None:
    async def run():
        service = Service(Callers())
        asked = pb.ModelReadyRequest(name="tiny", version="1")
        assert (await service.ServerLive(pb.ServerLiveRequest(), "c")).live
        assert (await service.ServerReady(pb.ServerReadyRequest(), "c")).ready
        assert (await service.ModelReady(asked, "c")).ready
        assert list((await service.ServerMetadata(pb.ServerMetadataRequest(), "c")).extensions) == ["sequence"]
        service.reason = "it is starting"
        assert (await service.ServerLive(pb.ServerLiveRequest(), "c")).live
        assert not (await service.ServerReady(pb.ServerReadyRequest(), "c")).ready
        assert not (await service.ModelReady(asked, "c")).ready
        with pytest.raises(LookupError):
            await service.ModelReady(pb.ModelReadyRequest(name="other"), "c")
        for call, request in (
            (service.ServerLive, pb.ServerLiveRequest()), (service.ServerReady, pb.ServerReadyRequest()),
            (service.ServerMetadata, pb.ServerMetadataRequest()), (service.ModelReady, asked),
        ):  # fmt: skip
            with pytest.raises(PermissionError):
                await call(request, "stranger")

    asyncio.run(run())
