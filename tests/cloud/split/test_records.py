"""Records between the server and its training process."""

from __future__ import annotations

import pytest

from cloud.split.records import FRAME, HEAD, SessionSpec, record
from edgefl.errors import ProtocolError
from tests.cloud.split.bench import settings


def test_a_session_goes_to_the_process_and_is_the_same_there() -> None:
    spec = SessionSpec(device="cam 1", round=3, tensors="/x", train=settings(), inputs="[]", samples=5, steps=7)
    assert SessionSpec.decode(spec.encode()) == spec
    with pytest.raises(ProtocolError, match="invalid session"):
        SessionSpec.decode(b"{}")


def test_a_record_says_its_length() -> None:
    data = record(7, FRAME, b"abc")
    assert HEAD.unpack(data[: HEAD.size]) == (7, FRAME, 3)
    assert data[HEAD.size :] == b"abc"
