"""Requests of a sequence: what is sent is read, and anything else is refused in words."""

from __future__ import annotations

import numpy as np
import pytest

from edgefl.errors import ProtocolError
from edgefl.offload.generation.sampling import Sampling
from edgefl.protocols.inference.sequences import (
    SequenceRequest,
    encode_hidden,
    make_sequence_request,
    parse_sequence_request,
)
from edgefl.protocols.inference.tensors import make_request

HIDDEN = np.arange(8, dtype=np.float32).reshape(2, 4)


def made(**changes):
    return make_sequence_request("m", "d" * 64, SequenceRequest(**{"sequence": "s", "hidden": HIDDEN} | changes))


@pytest.mark.parametrize("form", ["fp32", "fp16", "bf16"])
def test_a_request_is_read_as_it_was_made(form) -> None:
    given = SequenceRequest(
        sequence="abc", hidden=encode_hidden(HIDDEN, form), starts=True, position=0, max_tokens=9, wants_token=False,
        sampling=Sampling(temperature=0.5, top_p=0.25, seed=3),
    )  # fmt: skip
    seen = parse_sequence_request(make_sequence_request("m", "d", given), 4)
    np.testing.assert_array_equal(seen.hidden.astype(np.float32), HIDDEN)
    assert seen.hidden.dtype == given.hidden.dtype
    fields = ("sequence", "starts", "ends", "position", "max_tokens", "wants_token", "sampling")
    assert [getattr(seen, one) for one in fields] == [getattr(given, one) for one in fields]


def test_an_end_may_have_no_rows_and_a_number_may_name_a_sequence() -> None:
    request = made(hidden=HIDDEN[:0], ends=True, position=3)
    request.parameters["sequence_id"].int64_param = 17
    seen = parse_sequence_request(request, 4)
    assert (seen.sequence, seen.ends, seen.wants_token, len(seen.hidden)) == ("17", True, False, 0)


def test_formats_hold_their_range_or_say_so() -> None:
    large = np.full((1, 4), 70_000.0, np.float32)
    assert encode_hidden(large, "bf16").dtype.name == "bfloat16"
    with pytest.raises(ProtocolError, match="fp16 cannot hold, the largest is 7e"):
        encode_hidden(large, "fp16")
    with pytest.raises(ProtocolError, match="int8 changes their tokens"):
        encode_hidden(large, "int8")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden": HIDDEN[:, :3]}, r"has shape \[1, 2, 3\]; expected \[1, rows, 4\]"),
        ({"hidden": HIDDEN * np.nan}, "has NaN or infinity"),
        ({"hidden": HIDDEN.astype(np.float64)}, "expected FP32, FP16 or BF16"),
        ({"hidden": HIDDEN[:0]}, "has no rows"),
        ({"sequence": ""}, "keeps a state: send sequence_id"),
        ({"sequence": "x" * 129}, "keeps a state: send sequence_id"),
        ({"position": -1}, "'position' is -1"),
        ({"starts": True, "max_tokens": 0}, "'max_tokens' is 0"),
    ],
)
def test_bad_requests_are_refused(change, words) -> None:
    with pytest.raises(ProtocolError, match=words):
        parse_sequence_request(made(**change), 4)


def test_bad_parameters_are_refused() -> None:
    for name, field, value, words in (
        ("sequence_start", "int64_param", 1, "'sequence_start' is 1; expected a truth value"),
        ("temperature", "string_param", "hot", "'temperature' is 'hot'; expected a number"),
        ("temperature", "double_param", 9.0, "temperature 9.0 must be"),
        ("seed", "int64_param", -4, "'seed' is -4"),
    ):
        request = made()
        setattr(request.parameters[name], field, value)
        with pytest.raises(ProtocolError, match=words):
            parse_sequence_request(request, 4)
    with pytest.raises(ProtocolError, match="expected hidden alone"):
        parse_sequence_request(make_request("m", {"x": HIDDEN}), 4)
