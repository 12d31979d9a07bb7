from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TierItem(_message.Message):
    __slots__ = ("key", "value", "deleted", "complete")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    DELETED_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    key: str
    value: bytes
    deleted: bool
    complete: bool
    def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ..., deleted: _Optional[bool] = ..., complete: _Optional[bool] = ...) -> None: ...

class NextRequest(_message.Message):
    __slots__ = ("agent_version", "holding", "knows")
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    HOLDING_FIELD_NUMBER: _ClassVar[int]
    KNOWS_FIELD_NUMBER: _ClassVar[int]
    agent_version: str
    holding: _containers.RepeatedScalarFieldContainer[str]
    knows: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, agent_version: _Optional[str] = ..., holding: _Optional[_Iterable[str]] = ..., knows: _Optional[_Iterable[str]] = ...) -> None: ...

class NextReply(_message.Message):
    __slots__ = ("plans", "desired", "broker", "ended", "renew", "assignments", "parents")
    PLANS_FIELD_NUMBER: _ClassVar[int]
    DESIRED_FIELD_NUMBER: _ClassVar[int]
    BROKER_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENTS_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    plans: _containers.RepeatedScalarFieldContainer[bytes]
    desired: _containers.RepeatedScalarFieldContainer[bytes]
    broker: str
    ended: _containers.RepeatedScalarFieldContainer[str]
    renew: bool
    assignments: _containers.RepeatedCompositeFieldContainer[Assignment]
    parents: bytes
    def __init__(self, plans: _Optional[_Iterable[bytes]] = ..., desired: _Optional[_Iterable[bytes]] = ..., broker: _Optional[str] = ..., ended: _Optional[_Iterable[str]] = ..., renew: _Optional[bool] = ..., assignments: _Optional[_Iterable[_Union[Assignment, _Mapping]]] = ..., parents: _Optional[bytes] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("fit", "deliver", "evaluate")
    FIT_FIELD_NUMBER: _ClassVar[int]
    DELIVER_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    fit: bytes
    deliver: bytes
    evaluate: bytes
    def __init__(self, fit: _Optional[bytes] = ..., deliver: _Optional[bytes] = ..., evaluate: _Optional[bytes] = ...) -> None: ...

class DownloadRequest(_message.Message):
    __slots__ = ("sha256", "offset")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    offset: int
    def __init__(self, sha256: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class UpdateKey(_message.Message):
    __slots__ = ("job", "round", "sum", "model")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SUM_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    job: str
    round: int
    sum: int
    model: str
    def __init__(self, job: _Optional[str] = ..., round: _Optional[int] = ..., sum: _Optional[int] = ..., model: _Optional[str] = ...) -> None: ...

class UploadHeader(_message.Message):
    __slots__ = ("key", "offset", "size", "blake3", "weight", "metrics", "evaluation", "sum")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    KEY_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    BLAKE3_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    SUM_FIELD_NUMBER: _ClassVar[int]
    key: UpdateKey
    offset: int
    size: int
    blake3: str
    weight: float
    metrics: _containers.ScalarMap[str, float]
    evaluation: Evaluation
    sum: bytes
    def __init__(self, key: _Optional[_Union[UpdateKey, _Mapping]] = ..., offset: _Optional[int] = ..., size: _Optional[int] = ..., blake3: _Optional[str] = ..., weight: _Optional[float] = ..., metrics: _Optional[_Mapping[str, float]] = ..., evaluation: _Optional[_Union[Evaluation, _Mapping]] = ..., sum: _Optional[bytes] = ...) -> None: ...

class Evaluation(_message.Message):
    __slots__ = ("weight", "metrics", "fault")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    weight: float
    metrics: _containers.ScalarMap[str, float]
    fault: str
    def __init__(self, weight: _Optional[float] = ..., metrics: _Optional[_Mapping[str, float]] = ..., fault: _Optional[str] = ...) -> None: ...

class UploadChunk(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: UploadHeader
    data: bytes
    def __init__(self, header: _Optional[_Union[UploadHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class UploadState(_message.Message):
    __slots__ = ("status", "offset", "reason", "without")
    class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PARTIAL: _ClassVar[UploadState.Status]
        STORED: _ClassVar[UploadState.Status]
        STALE: _ClassVar[UploadState.Status]
        REFUSED: _ClassVar[UploadState.Status]
        REFOLD: _ClassVar[UploadState.Status]
    PARTIAL: UploadState.Status
    STORED: UploadState.Status
    STALE: UploadState.Status
    REFUSED: UploadState.Status
    REFOLD: UploadState.Status
    STATUS_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_FIELD_NUMBER: _ClassVar[int]
    status: UploadState.Status
    offset: int
    reason: str
    without: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, status: _Optional[_Union[UploadState.Status, str]] = ..., offset: _Optional[int] = ..., reason: _Optional[str] = ..., without: _Optional[_Iterable[str]] = ...) -> None: ...

class FailureReport(_message.Message):
    __slots__ = ("key", "reason")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    key: UpdateKey
    reason: str
    def __init__(self, key: _Optional[_Union[UpdateKey, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class FailureReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LogReport(_message.Message):
    __slots__ = ("request", "text", "cut")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    request: str
    text: bytes
    cut: bool
    def __init__(self, request: _Optional[str] = ..., text: _Optional[bytes] = ..., cut: _Optional[bool] = ...) -> None: ...

class LogReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("csr", "certificate", "signature")
    CSR_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    csr: bytes
    certificate: bytes
    signature: bytes
    def __init__(self, csr: _Optional[bytes] = ..., certificate: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class RenewReply(_message.Message):
    __slots__ = ("certificate", "ca")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    CA_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    ca: bytes
    def __init__(self, certificate: _Optional[bytes] = ..., ca: _Optional[bytes] = ...) -> None: ...
