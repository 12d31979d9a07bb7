"""Releases that end, hang or eat the process that tries them: only that one."""

from __future__ import annotations

import asyncio

import pytest

from edge_agent.releases.trial import try_model
from edgefl.errors import ProtocolError
from tests import onnx_models


@pytest.fixture
def attempt(tmp_path):
    def run(content, *, memory_mb=2000, within_s=60.0, cancel_after_s=None):
        path = tmp_path / "model.onnx"
        path.write_bytes(content)

        async def inside():
            async with asyncio.timeout(cancel_after_s):
                await try_model("m", 3, [(path, None)], memory_mb=memory_mb, within_s=within_s)

        asyncio.run(inside())

    return run


def test_a_good_one_passes(attempt):
    attempt(onnx_models.affine())


def test_one_that_does_not_load_says_why(attempt):
    with pytest.raises(ProtocolError, match=r"model m version 3 does not load: .*INVALID_PROTOBUF"):
        attempt(b"no onnx")


def test_a_crash_in_a_kernel_ends_the_trial_alone(attempt):
    with pytest.raises(ProtocolError, match="tried model m version 3 was killed by SIGFPE"):
        attempt(onnx_models.crash_at_start())


def test_one_that_never_ends_is_given_up(attempt):
    with pytest.raises(ProtocolError, match="was not loaded and run within 2 s"):
        attempt(onnx_models.endless_start(), within_s=2.0)


def test_one_that_eats_memory_is_stopped(attempt):
    with pytest.raises(ProtocolError, match=r"does not load|was killed by"):
        attempt(onnx_models.hungry_start(), memory_mb=1500)


def test_a_trial_that_is_no_longer_wanted_is_killed(attempt):
    with pytest.raises(TimeoutError):
        attempt(onnx_models.endless_start(), within_s=600.0, cancel_after_s=1.5)


def test_all_parts_of_a_release_are_tried_and_the_one_that_fails_is_told(tmp_path):
    good, bad = tmp_path / "good.onnx", tmp_path / "bad.onnx"
    good.write_bytes(onnx_models.affine())
    bad.write_bytes(b"no onnx")
    asyncio.run(try_model("m", 3, [(good, None), (good, None)], memory_mb=2000, within_s=60.0))
    with pytest.raises(ProtocolError, match=r"does not load: .*bad\.onnx|does not load: .*INVALID_PROTOBUF"):
        asyncio.run(try_model("m", 3, [(good, None), (bad, None)], memory_mb=2000, within_s=60.0))
