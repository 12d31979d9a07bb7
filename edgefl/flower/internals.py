"""The internals of Flower that edgefl needs and Flower does not export, all in this file.

- A `Message` can only be made in a process that has a task identity (`flwr.supercore.task_identity`).
- The grid that carries a message sets its id, through the metadata's `__dict__`.
- Flower's protobuf messages, and the functions that convert to and from them.
- The results of `Strategy.start` or of the legacy server are local to the user's main; wrappers record them.
Invariant: after a run, Flower is as it was before.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.common import parameters_to_ndarrays, serde
from flwr.common.constant import NUM_PARTITIONS_KEY, PARTITION_ID_KEY, SUPERLINK_NODE_ID, ErrorCode
from flwr.compat.common import recorddict_compat
from flwr.proto import message_pb2, recorddict_pb2
from flwr.server import server
from flwr.server.compat import legacy_context
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.history import History
from flwr.server.server import Server
from flwr.server.workflow.constant import MAIN_PARAMS_RECORD
from flwr.serverapp import server_app
from flwr.serverapp.strategy import Result, Strategy
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "NUM_PARTITIONS_KEY", "PARTITION_ID_KEY", "ErrorCode", "History", "LegacyContext", "Result", "Run",
    "RunNotRunningException", "Server",
]  # fmt: skip

ResultSource = Result | History | Server | LegacyContext  # objects that hold a strategy's results


class Interrupted(KeyboardInterrupt):
    """A Ctrl-C that ends a strategy with its result so far, so that the app can still save it."""


@contextmanager
def task_identity(run_id: int) -> Iterator[None]:
    """A context in which this process can create messages, as the ServerApp of a run."""
    before = vars(TaskIdentity)["_task_id"], vars(TaskIdentity)["_run_id"], vars(TaskIdentity)["_node_id"]
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, SUPERLINK_NODE_ID
    try:
        yield
    finally:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = before


@contextmanager
def collecting_results() -> Iterator[list[ResultSource]]:
    """Collect the results of strategies inside the context, also of those that Ctrl-C interrupts."""
    collector = _ResultCollector()
    with (
        _wrapped(Strategy, "start", collector.wrap_function),
        _wrapped(server_app, "start_grid", collector.wrap_function),
        _wrapped(sys.modules[Strategy.__module__], "Result", collector.wrap_constructor),
        _wrapped(server, "History", collector.wrap_constructor),
        _wrapped(legacy_context, "History", collector.wrap_constructor),
        _wrapped(Server, "fit", collector.wrap_method),
        _wrapped(LegacyContext, "__init__", collector.wrap_method),
    ):
        yield collector.sources


class _ResultCollector:
    """Collects result sources, in order, by wrapping the functions that create or use them."""

    def __init__(self) -> None:
        self.sources: list[ResultSource] = []

    def add(self, one: ResultSource) -> None:
        if not any(one is other for other in self.sources):
            self.sources.append(one)

    def wrap_constructor(self, made: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a constructor: record what it returns."""

        def wrapped(*arguments: Any, **options: Any) -> Any:
            one = made(*arguments, **options)
            self.add(one)
            return one

        return wrapped

    def wrap_method(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a method: record the object that it is called on."""

        @functools.wraps(method)
        def wrapped(one: Any, *arguments: Any, **options: Any) -> Any:
            self.add(one)
            return method(one, *arguments, **options)

        return wrapped

    def wrap_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function: record what it returns; if Ctrl-C ended a strategy, return its result so far, if any."""

        @functools.wraps(function)
        def wrapped(*arguments: Any, **options: Any) -> Any:
            before = len(self.sources)
            try:
                returned = function(*arguments, **options)
            except Interrupted:
                if (returned := _with_arrays(self.sources[before:])) is None:
                    raise
            if isinstance(returned, (Result, History)):
                self.add(returned)
            return returned

        return wrapped


def _with_arrays(sources: Sequence[ResultSource]) -> Result | None:
    return next((one for one in reversed(sources) if isinstance(one, Result) and one.arrays), None)


def legacy_arrays(one: Server | LegacyContext) -> ArrayRecord | None:
    """Return the current model of a legacy server or workflow; its arrays are numbered because they have no names."""
    if isinstance(one, Server):
        parameters = one.parameters
    else:
        record = one.state.array_records.get(MAIN_PARAMS_RECORD)
        if record is None:
            return None
        parameters = recorddict_compat.arrayrecord_to_parameters(record, keep_input=True)
    if not parameters.tensors:
        return None
    if parameters.tensor_type == "numpy.ndarray":
        return ArrayRecord(parameters_to_ndarrays(parameters))
    return ArrayRecord([np.frombuffer(tensor, np.uint8) for tensor in parameters.tensors])  # e.g. a tree of XGBoost


def give_id(message: Message, message_id: str) -> None:
    """Set a message's id, as every Flower grid does."""
    vars(message.metadata)["_message_id"] = message_id


def with_own_metadata(message: Message) -> Message:
    """Return a message with the same content and its own metadata."""
    twin = copy.copy(message)
    vars(twin)["_metadata"] = copy.copy(message.metadata)
    return twin


def twin_of(array: Array) -> Array:
    """Return an Array with the same bytes, at a tenth of the cost of its constructor."""
    twin = object.__new__(Array)
    vars(twin).update(dtype=array.dtype, shape=array.shape, stype=array.stype, data=array.data)
    return twin


def without_content(message: Message) -> Message:
    """Return the message without its content, which is sent separately."""
    twin = copy.copy(message)
    vars(twin)["_content"] = None
    return twin


def error_reply(request: Message, reason: str, code: int = ErrorCode.CLIENT_APP_RAISED_EXCEPTION) -> Message:
    """Report a client's failure the way Flower does: a reply that carries an Error."""
    return Message(Error(code=code, reason=reason), reply_to=request)


def records_bytes(records: RecordDict) -> bytes:
    """Return records in Flower's protobuf form; no bytes if there are no records."""
    return bytes(serde.recorddict_to_proto(records).SerializeToString())


def records_from(data: bytes) -> RecordDict:
    """Return what `records_bytes` packed."""
    return serde.recorddict_from_proto(recorddict_pb2.RecordDict.FromString(data))


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """Return a run config in the protobuf form of a Context that holds nothing else."""
    context = message_pb2.Context(run_config=serde.user_config_to_proto(dict(config)))
    return bytes(context.SerializeToString(deterministic=True))


def config_from(data: bytes) -> dict[str, Any]:
    """Return what `config_bytes` packed."""
    return dict(serde.user_config_from_proto(message_pb2.Context.FromString(data).run_config))


def metadata_bytes(message: Message) -> bytes:
    """Return a message's metadata in Flower's protobuf form."""
    return bytes(serde.message_to_proto(without_content(message)).metadata.SerializeToString())


def message_of(metadata: bytes, content: RecordDict) -> Message:
    """Return the message of packed metadata and a content."""
    envelope = message_pb2.Metadata.FromString(metadata)
    message = serde.message_from_proto(message_pb2.Message(metadata=envelope, content=recorddict_pb2.RecordDict()))
    message.content = content
    return message


def message_bytes(message: Message) -> bytes:
    """Return a whole message in Flower's protobuf form."""
    return bytes(serde.message_to_proto(message).SerializeToString())


def reply_from(data: bytes, request: Message) -> Message:
    """Return the content or error that `message_bytes` packed, as a reply to the request."""
    packed = message_pb2.Message.FromString(data)
    if packed.HasField("error"):
        return error_reply(request, packed.error.reason, packed.error.code)
    return Message(serde.recorddict_from_proto(packed.content), reply_to=request)


@contextmanager
def _wrapped(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        setattr(owner, name, original)
