"""Wire formats: how the tensors at a cut become bytes, and arrays again.

    fp32   each tensor as it is
    fp16   floats in half precision: relative error 2^-11; a value beyond 65504 is refused
    bf16   floats in bfloat16: relative error 2^-8, the range of float32
    int8   floats in groups of 32 neighbours with a common scale: error at most half of the group's largest value / 127.
           Channels whose values are far larger than the others' (Dettmers et al. 2022) are sent apart, in fp16

Integers and booleans are sent as they are in every format. In int8, so are 0-d tensors, and floats with infinities,
such as masks, as in fp16.
A message begins with b"EFW1", uint8 number of tensors, then for each tensor

    uint8 format, uint8 dtype, uint8 dimensions, uint8 length of the name, the name in UTF-8, uint32 for each dimension

and then the tensors' contents, in this order. All is little-endian. The content of int8 is: float32 unit, uint8 number
of channels apart, uint16 for each of them, their values in fp16, for each group a float16 scale in units, int8 values.
Invariant: `decode` allocates nothing before all sizes fit what came and what is allowed; it returns no NaN.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgefl.errors import ProtocolError
from edgefl.trees import Array, Tree, bfloat16

FORMATS = ("fp32", "fp16", "bf16", "int8")
GROUP = 32  # neighbours with one scale
MAX_MESSAGE_BYTES = 256 << 20  # of the decoded tensors
MAX_TENSORS, MAX_DIMENSIONS, MAX_NAME_BYTES = 64, 8, 255
MAX_APART = 255
_MAGIC = b"EFW1"
_LARGEST_HALF = 65504.0
_FAR = 8.0  # times the median of the channels' largest values
_APART_SHARE = 16  # at most one channel in so many is sent apart
_DTYPES: Sequence[np.dtype[Any]] = tuple(
    np.dtype(one) for one in ("<f4", "<f2", "<f8", "?", "i1", "u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8")
)


@dataclass(frozen=True, slots=True)
class _TensorHead:
    """What a message says of one tensor."""

    name: str
    form: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def encode(tensors: Tree, form: str) -> bytes:
    """Return tensors as bytes, in one of `FORMATS`.

    Raises ProtocolError for a value that the format cannot hold: NaN, or one beyond fp16's range.
    """
    if form not in FORMATS:
        raise ProtocolError(f"there is no wire format {form!r}; expected one of: {', '.join(FORMATS)}")
    if not 0 < len(tensors) <= MAX_TENSORS:
        raise ProtocolError(f"a message has 1 to {MAX_TENSORS} tensors, got {len(tensors)}")
    heads, contents = [_MAGIC, struct.pack("<B", len(tensors))], []
    for name, array in tensors.items():
        chosen = _form_of(name, array, form)
        heads.append(_head_bytes(name, array, chosen))
        contents.append(_content(name, array, chosen))
    return b"".join((*heads, *contents))


def decode(message: bytes | memoryview, *, max_bytes: int = MAX_MESSAGE_BYTES) -> dict[str, Array]:
    """Return the tensors of a message, in the dtypes that they had.

    Raises ProtocolError for anything that `encode` does not write, and for tensors of more than `max_bytes`.
    """
    reader = _MessageReader(memoryview(message))
    heads = list(_heads(reader))
    if (total := sum(one.size * one.dtype.itemsize for one in heads)) > max_bytes:
        raise ProtocolError(f"the tensors of a message have {total} bytes, allowed: {max_bytes}")
    found = {one.name: _array(reader, one) for one in heads}
    if len(found) != len(heads):
        raise ProtocolError("a message has two tensors of one name")
    if reader.left:
        raise ProtocolError(f"a message has {reader.left} bytes behind its last tensor")
    return found


def _form_of(name: str, array: Array, form: str) -> str:
    """Return how a tensor is sent: not every tensor can be sent in every format."""
    if array.dtype.kind != "f":
        return FORMATS[0]
    if np.isnan(array).any():
        raise ProtocolError(f"tensor {name!r} {array.dtype}{list(array.shape)} has NaN; the stage before it failed")
    if form == "int8" and (array.ndim == 0 or array.size == 0):  # no group: half precision could make it 0
        return FORMATS[0]
    if form == "int8" and not np.isfinite(array).all():
        return "fp16"
    return form


def _head_bytes(name: str, array: Array, form: str) -> bytes:
    dtype, text = array.dtype.newbyteorder("<") if array.dtype.itemsize > 1 else array.dtype, name.encode()
    if dtype not in _DTYPES or array.ndim > MAX_DIMENSIONS or not 0 < len(text) <= MAX_NAME_BYTES:
        raise ProtocolError(f"tensor {name!r} {array.dtype}{list(array.shape)} cannot be sent")
    fixed = struct.pack("<BBBB", FORMATS.index(form), _DTYPES.index(dtype), array.ndim, len(text))
    return fixed + text + struct.pack(f"<{array.ndim}I", *array.shape)


def _content(name: str, array: Array, form: str) -> bytes:
    if form == "fp16":
        return _half(name, array).tobytes()
    if form == "bf16":
        return array.astype(bfloat16()).tobytes()
    if form == "int8":
        return _int8_bytes(name, array)
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _half(name: str, array: Array) -> Array:
    largest = float(np.abs(array[np.isfinite(array)]).max(initial=0.0))
    if largest > _LARGEST_HALF:
        raise ProtocolError(
            f"tensor {name!r} has {largest:.3g}, and fp16 ends at {_LARGEST_HALF:g}; send it in bf16 or fp32"
        )
    return array.astype("<f2")


def _channel_axis(shape: Sequence[int]) -> int:
    """Return where the channels are: axis 1 of pictures (N, C, H, W), the last axis of tokens (N, T, C)."""
    return 1 if len(shape) >= 4 else max(0, len(shape) - 1)


def _apart(array: Array) -> Array:
    """Return the channels whose largest value is far above the others', the largest first, as uint16."""
    if array.ndim < 2:
        return np.empty(0, "<u2")
    axis = _channel_axis(array.shape)
    peaks = np.abs(array).max(axis=tuple(one for one in range(array.ndim) if one != axis))
    most = min(MAX_APART, len(peaks) // _APART_SHARE, 1 << 16)
    largest = np.argsort(-peaks, kind="stable")[:most]
    return np.sort(largest[peaks[largest] > _FAR * np.median(peaks)]).astype("<u2")


def _int8_bytes(name: str, array: Array) -> bytes:
    axis = _channel_axis(array.shape)
    apart = _apart(array) if array.shape[axis : axis + 1] <= (1 << 16,) else np.empty(0, "<u2")
    outside = _half(name, np.take(array, apart, axis)) if len(apart) else np.empty(0, "<f2")
    inside = (np.delete(array, apart, axis) if len(apart) else array).reshape(-1).astype(np.float32)
    if not np.isfinite(inside).all():  # a float64 beyond float32
        raise ProtocolError(f"tensor {name!r} is beyond the range of float32; send it in fp32, which keeps its type")
    padded = np.zeros(_groups(len(inside)) * GROUP, np.float32)
    padded[: len(inside)] = inside
    grouped = padded.reshape(-1, GROUP)
    scales = np.abs(grouped).max(axis=1) / np.float32(127)
    unit = scales.max(initial=np.float32(0))
    shares = (scales / unit if unit > 0 else scales).astype("<f2")
    steps = shares.astype(np.float32) * unit
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.where(steps[:, None] > 0, np.rint(grouped / steps[:, None]), 0).clip(-127, 127)
    content = values.astype(np.int8).reshape(-1)[: len(inside)]
    head: bytes = struct.pack("<fB", unit, len(apart)) + apart.tobytes()
    return b"".join((head, outside.tobytes(), shares.tobytes(), content.tobytes()))


def _groups(size: int) -> int:
    return -(-size // GROUP)


class _MessageReader:
    """Reads a message from its beginning; raises ProtocolError at its end."""

    def __init__(self, message: memoryview) -> None:
        self._message, self._at = message.cast("B"), 0

    @property
    def left(self) -> int:
        return len(self._message) - self._at

    def take(self, num_bytes: int) -> memoryview:
        if num_bytes > self.left:
            raise ProtocolError(f"a message ends {num_bytes - self.left} bytes too early")
        self._at += num_bytes
        return self._message[self._at - num_bytes : self._at]

    def unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def array(self, dtype: str | np.dtype[Any], size: int) -> Array:
        made = np.dtype(dtype)
        return np.frombuffer(self.take(size * made.itemsize), made)


def _heads(reader: _MessageReader) -> Iterator[_TensorHead]:
    if bytes(reader.take(min(4, reader.left))) != _MAGIC:
        raise ProtocolError(f"this is no message of tensors at a cut: it does not begin with {_MAGIC.decode()}")
    (num,) = reader.unpack("<B")
    if not 0 < num <= MAX_TENSORS:
        raise ProtocolError(f"a message has 1 to {MAX_TENSORS} tensors, got {num}")
    for _ in range(num):
        form, dtype, ndim, length = reader.unpack("<BBBB")
        if form >= len(FORMATS) or dtype >= len(_DTYPES) or ndim > MAX_DIMENSIONS or not length:
            raise ProtocolError(f"a message has a tensor of format {form}, dtype {dtype}, {ndim} dimensions")
        if form and _DTYPES[dtype].kind != "f":
            raise ProtocolError(f"a message has a tensor of {_DTYPES[dtype]} in {FORMATS[form]}, which is for floats")
        try:
            name = bytes(reader.take(length)).decode()
        except UnicodeDecodeError as cause:
            raise ProtocolError("the name of a tensor in a message is not UTF-8") from cause
        yield _TensorHead(name, FORMATS[form], _DTYPES[dtype], reader.unpack(f"<{ndim}I"))


def _array(reader: _MessageReader, head: _TensorHead) -> Array:
    if head.form == "int8":
        made = _from_int8(reader, head)
    else:
        stored = {"fp16": np.dtype("<f2"), "bf16": bfloat16()}.get(head.form, head.dtype)
        made = reader.array(stored, head.size).astype(head.dtype).reshape(head.shape)
    if head.dtype.kind == "f" and np.isnan(made).any():
        raise ProtocolError(f"tensor {head.name!r} of a message has NaN")
    return made


def _from_int8(reader: _MessageReader, head: _TensorHead) -> Array:
    if not head.shape or not head.size:
        raise ProtocolError(f"tensor {head.name!r} of a message is int8 without elements or dimensions")
    axis = _channel_axis(head.shape)
    unit, num_apart = reader.unpack("<fB")
    apart = reader.array("<u2", num_apart)
    channels = head.shape[axis]
    others = head.size // channels
    if not (math.isfinite(unit) and unit >= 0) or (np.diff(apart.astype(int)) <= 0).any() or (apart >= channels).any():
        raise ProtocolError(f"tensor {head.name!r} of a message has unit {unit} and channels {apart.tolist()} apart")
    outside = reader.array("<f2", num_apart * others)
    size = head.size - num_apart * others
    shares, values = reader.array("<f2", _groups(size)), reader.array("i1", size)
    if not (np.isfinite(shares).all() and (shares >= 0).all() and np.isfinite(outside).all()):
        raise ProtocolError(f"tensor {head.name!r} of a message has scales or values that are not finite")
    steps = np.repeat(shares.astype(np.float32) * np.float32(unit), GROUP)[:size]
    inside = (values * steps).astype(head.dtype)
    if not num_apart:
        return inside.reshape(head.shape)
    made = np.empty(head.shape, head.dtype)
    moved = np.moveaxis(made, axis, 0)  # a view
    kept = np.ones(channels, bool)
    kept[apart] = False
    rest = (*head.shape[:axis], channels - num_apart, *head.shape[axis + 1 :])
    moved[kept] = np.moveaxis(inside.reshape(rest), axis, 0)
    moved[apart] = np.moveaxis(outside.reshape((*head.shape[:axis], num_apart, *head.shape[axis + 1 :])), axis, 0)
    return made


def through(tensors: Tree, form: str) -> dict[str, Array]:
    """Return tensors as they arrive behind a link in this format."""
    return decode(encode(tensors, form))


def sizes(tensors: Tree, forms: Sequence[str] = FORMATS) -> Mapping[str, int]:
    """Return the bytes of a message by format, without the formats that cannot hold a value of the tensors."""
    found: dict[str, int] = {}
    for form in forms:
        try:
            found[form] = len(encode(tensors, form))
        except ProtocolError:
            if form == FORMATS[0]:
                raise
    return found
