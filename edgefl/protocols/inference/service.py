"""The gRPC service of the Open Inference Protocol: its methods, a client's stub and a server's handler.

A server gets requests for inference as bytes, and parses them itself, so that it can say what is wrong with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from edgefl.protocols.inference import open_inference_grpc_pb2 as pb

SERVICE = "inference.GRPCInferenceService"  # also Triton's and KServe's
REQUEST_DIGEST = "release_digest"  # parameter of a request: the SHA-256 of the model file that it is for, in hex
REQUEST_TIMEOUT = "timeout"  # parameter of a request: microseconds that it may take, as in Triton
# Parameter of a request whose tensors are one message of `edgefl.offload.wire`: its format; property of a model: the
# formats that its server decodes.
WIRE_FORMAT, WIRE_FORMATS = "wire_format", "wire_formats"
SERVER_TIME = "server_us"  # parameter of a response: microseconds from the request's arrival until it was computed
WIRE_INPUT = "crossing"  # the name of that message's tensor: UINT8, its number of bytes
STREAM_STATUS = "status"  # parameter of an error on a stream: the name of a gRPC status code


def tail_name(model: str, num_head: int) -> str:
    """Return the name of the part of a model behind so many layers, as clients of a stage server ask for it."""
    return f"{model}.{num_head}"


_UNARY: Mapping[str, tuple[Any, Any]] = {
    "ServerLive": (pb.ServerLiveRequest, pb.ServerLiveResponse),
    "ServerReady": (pb.ServerReadyRequest, pb.ServerReadyResponse),
    "ServerMetadata": (pb.ServerMetadataRequest, pb.ServerMetadataResponse),
    "ModelReady": (pb.ModelReadyRequest, pb.ModelReadyResponse),
    "ModelMetadata": (pb.ModelMetadataRequest, pb.ModelMetadataResponse),
    "ModelInfer": (pb.ModelInferRequest, pb.ModelInferResponse),
}
_STREAM = "ModelStreamInfer"


class InferenceStub:
    """A client's methods on a channel, of `grpc` or `grpc.aio`, as generated stubs have them."""

    def __init__(self, channel: Any) -> None:
        for name, (request, response) in _UNARY.items():
            call = channel.unary_unary(
                f"/{SERVICE}/{name}",
                request_serializer=request.SerializeToString,
                response_deserializer=response.FromString,
            )
            setattr(self, name, call)
        stream = channel.stream_stream(
            f"/{SERVICE}/{_STREAM}",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )
        setattr(self, _STREAM, stream)

    def __getattr__(self, name: str) -> Any:  # for type checkers: the methods are set above
        raise AttributeError(f"the service {SERVICE} has no method {name!r}; it has: {', '.join((*_UNARY, _STREAM))}")


class InferenceServicer(Protocol):
    """What a server of the protocol implements, besides the six unary methods by their names.

    ModelInfer and ModelStreamInfer iterate over their requests, as bytes, when they are ready for them: until then a
    request waits in the client, or in the flow control's window.
    """

    async def ModelInfer(self, requests: Any, context: Any) -> Any: ...  # noqa: N802 - gRPC's name

    async def ModelStreamInfer(self, requests: Any, context: Any) -> None: ...  # noqa: N802


def inference_handler(servicer: InferenceServicer, wrap: Any = lambda method: method) -> Any:
    """Return the `grpc.GenericRpcHandler` of a servicer of `grpc.aio`; `wrap` is applied to each method."""
    import grpc

    methods: dict[str, Any] = {}
    for name, (request, response) in _UNARY.items():
        # A server may declare a unary method as a stream of requests: on the wire they are the same.
        make = grpc.stream_unary_rpc_method_handler if name == "ModelInfer" else grpc.unary_unary_rpc_method_handler
        parse = None if name == "ModelInfer" else request.FromString
        methods[name] = make(wrap(getattr(servicer, name)), parse, response.SerializeToString)
    methods[_STREAM] = grpc.stream_stream_rpc_method_handler(
        wrap(servicer.ModelStreamInfer),
        None,
        pb.ModelStreamInferResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(SERVICE, methods)
