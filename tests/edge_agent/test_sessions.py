"""Loading models, and what does not load."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest

from edge_agent import sessions
from edge_agent.sessions import Cancellation, Models, TensorInfo, load
from edgefl.errors import ProtocolError
from edgefl.models.session import new_session
from tests import onnx_models


@pytest.fixture
def path(tmp_path, onnx_model):
    (tmp_path / "model.onnx").write_bytes(onnx_model())
    return tmp_path / "model.onnx"


def test_a_model_is_described_and_runs(path):
    served = load("affine", 4, path)
    assert served.inputs == (TensorInfo("x", "FP32", (-1, 3)),)
    assert served.outputs == (TensorInfo("y", "FP32", (-1, 3)),)
    [y] = served.run(["y"], {"x": np.ones((2, 3), np.float32)})
    assert y.tolist() == [[3.0] * 3] * 2
    assert served.inline


def test_a_slow_model_is_not_for_the_event_loop(path, monkeypatch):
    monkeypatch.setattr(sessions, "INLINE_S", 0.0)
    assert not load("affine", 4, path).inline


@pytest.mark.parametrize("damage", [b"", b"no onnx", None])
def test_what_does_not_load_says_so(path, damage):
    path.write_bytes(path.read_bytes()[:-20] if damage is None else damage)
    with pytest.raises(ProtocolError, match="model affine version 4 does not load"):
        load("affine", 4, path)


def test_values_that_a_model_cannot_take(path):
    served = load("affine", 4, path)
    with pytest.raises(ProtocolError, match="cannot process these values"):
        served.run(["y"], {"x": np.ones((2, 2), np.float32)})


def test_a_model_that_cannot_take_zeros_is_warmed_up_with_ones(path):
    path.write_bytes(onnx_models.divider())
    served = load("divider", 1, path)
    assert served.run(["y"], {"a": np.array([[8]], np.int32), "b": np.array([[2]], np.int32)})[0].tolist() == [[4]]


def test_only_a_fast_model_runs_in_the_event_loop(path):
    served = load("affine", 4, path)
    assert served.runs_inline({"x": np.zeros((1, 3), np.float32)})
    assert not served.runs_inline({"x": np.zeros((100_000, 3), np.float32)})
    path.write_bytes(onnx_models.counter())
    assert not load("counter", 1, path).runs_inline({"times": np.array(1)})  # its time depends on values


def test_a_model_that_was_misjudged_once_is_not_for_the_event_loop_any_more(path, monkeypatch):
    served = load("affine", 4, path)
    monkeypatch.setattr(sessions, "SLOW_S", 0.0)
    feeds = {"x": np.zeros((1, 3), np.float32)}
    served.run(["y"], feeds)
    assert served.runs_inline(feeds)  # perhaps others had the core
    served.run(["y"], feeds)
    assert not served.runs_inline(feeds)


def test_a_run_can_be_stopped_from_another_thread(path):
    path.write_bytes(onnx_models.counter())
    served = load("counter", 1, path)
    cancellation = Cancellation()
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(served.run, ["counted"], {"times": np.array(2**40)}, cancellation)
        cancellation.cancel()
        with pytest.raises(ProtocolError):
            running.result(60)


def test_a_large_request_leaves_no_memory_behind(path):
    path.write_bytes(onnx_models.outer())
    served = load("outer", 1, path)
    process = psutil.Process()
    served.run(["y"], {"x": np.ones(1000, np.float32)})
    before = process.memory_info().rss
    served.run(["y"], {"x": np.ones(8000, np.float32)})  # 256 MB of pairs
    assert process.memory_info().rss - before < 100e6


def test_a_model_with_strings_is_refused(tmp_path):
    from onnx import TensorProto, helper

    info = [helper.make_tensor_value_info(name, TensorProto.STRING, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", info[:1], info[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "m").write_bytes(model.SerializeToString())
    with pytest.raises(ProtocolError, match=r"'x' of type tensor\(string\); expected: BOOL"):
        load("names", 1, tmp_path / "m")


def test_a_version_takes_the_place_of_the_one_before(path):
    models = Models()
    models.put(load("affine", 1, path))
    models.put(load("affine", 2, path))
    assert models.versions() == {"affine": 2}
    assert models.get("other") is None


def test_a_quick_model_runs_on_one_thread_in_the_event_loop_and_on_all_elsewhere(path, monkeypatch):
    opened = {}

    def watched(path, *, threads=0, **options):
        opened[threads] = new_session(path, threads=threads, **options)
        return opened[threads]

    monkeypatch.setattr(sessions, "new_session", watched)
    monkeypatch.setattr(sessions, "MAX_SLOWDOWN", float("inf"))
    served = load("affine", 1, path)
    assert (served.inline_session, served.session) == (opened[1], opened[0])
    feeds = {"x": np.ones((1, 3), np.float32)}
    [here], [there] = served.run(["y"], feeds), served.run(["y"], feeds, Cancellation())
    assert here.tolist() == there.tolist()
    monkeypatch.setattr(sessions, "MAX_SLOWDOWN", 0.0)
    assert load("affine", 1, path).inline_session is opened[0]


def test_a_slow_model_is_loaded_once(path, monkeypatch):
    threads = []

    def watched(path, **options):
        threads.append(options.get("threads", 0))
        return new_session(path, **options)

    monkeypatch.setattr(sessions, "new_session", watched)
    monkeypatch.setattr(sessions, "INLINE_S", 0.0)
    load("affine", 1, path)
    assert threads == [0]
