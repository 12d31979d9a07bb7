"""Wire formats: by hand, by law over many tensors, and by bytes that an enemy sends."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgefl.errors import ProtocolError
from edgefl.offload import wire
from edgefl.offload.wire import FORMATS, GROUP, decode, encode, sizes, through

FLOATS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=0, max_dims=4, max_side=9),
    elements=st.floats(-6e4, 6e4, width=32),
)
BOUND = {"fp32": 0.0, "fp16": 2.0**-11, "bf16": 2.0**-8}


@pytest.mark.parametrize("form", FORMATS)
def test_a_message_by_hand(form):
    sent = {"h": np.array([[1.0, -2.0], [0.5, 127.0]], np.float32), "n": np.array([3], np.int64)}
    assert {name: one.tolist() for name, one in through(sent, form).items()} == {
        "h": [[1.0, -2.0], [0.0 if form == "int8" else 0.5, 127.0]],  # steps of 1: half a step is even
        "n": [3],
    }
    head = 5 + (4 + 1 + 8) + (4 + 1 + 4)
    assert len(encode(sent, form)) == head + 8 + {"fp32": 16, "fp16": 8, "bf16": 8, "int8": 5 + 2 + 4}[form]


@settings(deadline=None, max_examples=60)
@given(FLOATS, st.sampled_from(sorted(BOUND)))
def test_the_error_of_a_float_is_below_its_format_s_bound(array, form):
    seen = through({"x": array}, form)["x"]
    assert (seen.shape, seen.dtype) == (array.shape, array.dtype)
    allowed = BOUND[form] * np.abs(array.astype(np.float64)) + (2.0**-25 if form == "fp16" else 1e-40)
    assert (np.abs(seen.astype(np.float64) - array) <= allowed).all()


@settings(deadline=None, max_examples=60)
@given(FLOATS)
def test_the_error_of_int8_is_half_a_step_of_its_group(array):
    seen = through({"x": array}, "int8")["x"].astype(np.float64)
    flat = array.reshape(-1).astype(np.float64)
    peaks = np.array([np.abs(flat[at : at + GROUP]).max() for at in range(0, flat.size, GROUP)])
    largest = peaks.max(initial=0.0)
    steps = np.repeat(peaks / 127, GROUP)[: flat.size]
    if array.size == 0 or array.ndim == 0 or len(wire._apart(array)) == 0:
        assert (np.abs(seen.reshape(-1) - flat) <= 0.5005 * steps + largest * 2.0**-24 + 1e-38).all()


@settings(deadline=None, max_examples=40)
@given(FLOATS, st.sampled_from(FORMATS))
def test_what_arrived_is_sent_again_unchanged(array, form):
    once = through({"x": array}, form)
    again = through(once, form)["x"]
    allowed = 1e-6 * np.abs(once["x"]).max(initial=0.0) if form == "int8" else 0.0
    assert np.abs(again - once["x"]).max(initial=0.0) <= allowed


@pytest.mark.parametrize("shape", [(2, 5, 64), (2, 64, 3, 3), (7, 64)])
def test_a_channel_far_above_the_others_is_sent_apart(shape):
    rng = np.random.default_rng(0)
    array = rng.normal(size=shape).astype(np.float32)
    axis = 1 if len(shape) == 4 else len(shape) - 1
    np.moveaxis(array, axis, 0)[[3, 17]] *= 500
    assert wire._apart(array).tolist() == [3, 17]
    seen = through({"x": array}, "int8")["x"]
    others = np.delete(np.arange(64), [3, 17])
    assert np.abs(np.take(seen - array, others, axis)).max() < 0.5 * 5 / 127  # as if the two were not there
    apart = np.take(array, [3, 17], axis)
    assert (np.abs(np.take(seen, [3, 17], axis) - apart) <= np.abs(apart) * 2.0**-11).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.uint8, np.bool_, np.int32, np.uint64])
@pytest.mark.parametrize("form", FORMATS)
def test_every_type_comes_back_as_what_it_was(dtype, form):
    sent = np.arange(6).reshape(2, 3).astype(dtype)
    seen = through({"x": sent, "empty": sent[:0]}, form)
    assert (seen["x"].dtype, seen["empty"].shape) == (sent.dtype, (0, 3))
    assert np.allclose(seen["x"].astype(float), sent.astype(float), atol=0.03 if form == "int8" else 0.0)


@pytest.mark.parametrize("value", [6.1482628e-30, -3e38, 1e-45, 0.0])
def test_a_single_number_is_exact_in_int8(value):
    """In half precision, a number as small as an epsilon would be 0, and a large one be refused."""
    array = np.array(value, np.float32)
    assert through({"x": array}, "int8")["x"] == array


def test_a_mask_with_infinities_survives():
    mask = np.array([[0.0, -np.inf]], np.float32)
    for form in FORMATS:
        assert through({"mask": mask}, form)["mask"].tolist() == mask.tolist()


def test_what_a_format_cannot_hold_is_refused_and_has_no_size():
    large = {"x": np.array([[70_000.0, 1.0]], np.float32)}
    with pytest.raises(ProtocolError, match=r"has 7e\+04, and fp16 ends at 65504"):
        encode(large, "fp16")
    assert sizes(large).keys() == {"fp32", "bf16", "int8"}
    with pytest.raises(ProtocolError, match="has NaN"):
        encode({"x": np.array([np.nan], np.float32)}, "fp32")
    with pytest.raises(ProtocolError, match="no wire format 'int4'"):
        encode(large, "int4")
    with pytest.raises(ProtocolError, match="cannot be sent"):
        encode({"x": np.array(["text"])}, "fp32")
    with pytest.raises(ProtocolError, match="1 to 64 tensors, got 0"):
        encode({}, "fp32")


def good(form="int8"):
    return encode({"x": np.linspace(-1, 1, 66, dtype=np.float32).reshape(1, 66)}, form)


@pytest.mark.parametrize("form", FORMATS)
def test_a_message_cut_anywhere_or_too_long_is_refused(form):
    message = good(form)
    for end in range(len(message)):
        with pytest.raises(ProtocolError):
            decode(message[:end])
    with pytest.raises(ProtocolError, match="1 bytes behind its last tensor"):
        decode(message + b"!")


def test_huge_shapes_are_refused_before_anything_is_allocated():
    head = b"EFW1\x01" + struct.pack("<BBBB", 3, 0, 8, 1) + b"x" + struct.pack("<8I", *[2**32 - 1] * 8)
    with pytest.raises(ProtocolError, match="allowed: 268435456"):
        decode(head)
    with pytest.raises(ProtocolError, match="have 264 bytes, allowed: 100"):
        decode(good(), max_bytes=100)


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (0, b"X", "no message of tensors"),
        (4, b"\x00", "1 to 64 tensors"),
        (5, b"\x09", "format 9"),
        (6, b"\x09", "in int8, which is for floats"),
        (7, b"\xff", "255 dimensions"),
        (9, b"\xff", "not UTF-8"),
        (18, struct.pack("<f", float("nan")), "has unit nan"),
        (18, struct.pack("<f", -1.0), "has unit -1"),
        (22, b"\x01\x00\x00", "ends"),
        (23, struct.pack("<e", float("inf")), "not finite"),
    ],
)
def test_an_enemy_s_bytes_are_refused_in_words(at, value, words):
    message = bytearray(good())
    message[at : at + len(value)] = value
    with pytest.raises(ProtocolError, match=words):
        decode(bytes(message))


def test_nan_in_floats_and_one_name_twice_are_refused():
    message = bytearray(good("fp32"))
    message[-4:] = struct.pack("<f", float("nan"))
    with pytest.raises(ProtocolError, match="'x' of a message has NaN"):
        decode(bytes(message))
    two = encode({"a": np.zeros(1, np.float32), "b": np.zeros(1, np.float32)}, "fp32")
    with pytest.raises(ProtocolError, match="two tensors of one name"):
        decode(two.replace(b"b", b"a", 1))


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=80), st.integers(0, 40))
def test_any_bytes_are_tensors_or_refused(noise, at):
    message = bytearray(good())
    message[at : at + len(noise)] = noise
    for one in (bytes(message), b"EFW1" + noise):
        try:
            decode(one, max_bytes=10_000)
        except ProtocolError:
            continue
