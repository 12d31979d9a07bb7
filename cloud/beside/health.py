"""The calls of the Open Inference Protocol that ask whether a server and its model are ready; for both servers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from cloud.dataplane.callers import Callers, Context
from edgefl import __version__
from edgefl.protocols.inference import open_inference_grpc_pb2 as pb


class HealthCalls(ABC):
    """A service of one model, which is ready as soon as nothing is in the way (`_reason`)."""

    _extensions: tuple[str, ...] = ()

    def __init__(self, callers: Callers) -> None:
        self._callers = callers

    @abstractmethod
    def _reason(self) -> str:
        """Return why nothing is computed now; empty = it is ready."""

    @abstractmethod
    async def _find(self, name: str, version: str, context: Context) -> Any:
        """Abort a call for a model or a version that is not here."""

    async def ServerLive(self, _request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:  # noqa: N802
        await self._callers.any(context)
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(  # noqa: N802
        self, _request: pb.ServerReadyRequest, context: Context
    ) -> pb.ServerReadyResponse:
        await self._callers.any(context)
        return pb.ServerReadyResponse(ready=not self._reason())

    async def ServerMetadata(  # noqa: N802
        self, _request: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        await self._callers.any(context)
        return pb.ServerMetadataResponse(name="edgefl-stages", version=__version__, extensions=self._extensions)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:  # noqa: N802
        await self._callers.any(context)
        await self._find(request.name, request.version, context)
        return pb.ModelReadyResponse(ready=not self._reason())
