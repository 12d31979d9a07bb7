"""Steps of a tail's process: caches by key, errors by item, and the loop over its socket."""

from __future__ import annotations

import socket
import threading

import numpy as np
import pytest

from cloud.generation import tail_main
from cloud.generation.tail_main import Tail, chosen_engine, load_tail, serve
from cloud.generation.wire import (
    HEAD,
    RunStep,
    StepDone,
    StepItem,
    TailNotLoaded,
    TailUp,
    packed,
    parse_header,
    sizes_of,
)
from edgefl.offload.generation.blocks import numpy_engine
from edgefl.offload.generation.generate import load_part
from tests.language_models import write_stages

ROWS = np.random.default_rng(1).normal(size=(6, 32)).astype(np.float32)


@pytest.fixture
def tail(tmp_path):
    write_stages(tmp_path, 2)
    return Tail(load_part(tmp_path / "tail", numpy_engine()))


def step(*items, drop=()):
    return RunStep(step=1, items=list(items), drop=list(drop))


def item(key, num, position, **more):
    return StepItem(
        **{"key": key, "num": num, "datatype": "FP32", "position": position, "room": 8, "wants_token": True} | more
    )


def test_pieces_give_the_token_of_the_whole(tail) -> None:
    whole = tail.step(step(item(1, 6, 0)), ROWS.tobytes())
    first = tail.step(step(item(2, 4, 0, wants_token=False)), ROWS[:4].tobytes())
    second = tail.step(step(item(2, 2, 4)), ROWS[4:].tobytes())
    assert (first.tokens, whole.errors, second.errors) == ([None], [""], [""])
    assert whole.tokens == second.tokens


def test_items_of_other_lengths_and_types_share_a_step(tail) -> None:
    alone = [tail.step(step(item(9, num, 0)), ROWS[:num].tobytes()).tokens[0] for num in (5, 1, 2)]
    half = ROWS[:1].astype(np.float16)
    assert np.array_equal(half, ROWS[:1].astype(np.float16))
    body = ROWS[:5].tobytes() + half.tobytes() + ROWS[:2].tobytes()
    done = tail.step(step(item(1, 5, 0), item(2, 1, 0, datatype="FP16"), item(3, 2, 0)), body)
    assert done.errors == ["", "", ""]
    assert [done.tokens[0], done.tokens[2]] == [alone[0], alone[2]]
    assert done.seconds > 0


def test_a_wrong_position_is_an_error_of_that_item_alone(tail) -> None:
    tail.step(step(item(1, 2, 0)), ROWS[:2].tobytes())
    done = tail.step(step(item(1, 1, 9), item(2, 1, 0), item(7, 1, 3)), ROWS[:3].tobytes())
    assert done.errors == ["the cache has 2 tokens, expected 9", "", "the cache has 0 tokens, expected 3"]
    assert [token is None for token in done.tokens] == [True, False, True]
    again = tail.step(step(item(1, 1, 2)), ROWS[2:3].tobytes())
    assert again.errors == [""]


def test_activations_without_a_finite_result_are_an_error_of_that_item(tail, monkeypatch) -> None:
    logits = tail._part.logits

    def damaged(hidden):
        made = logits(hidden)
        made[0, 3] = np.nan
        return made

    monkeypatch.setattr(tail._part, "logits", damaged)
    done = tail.step(step(item(1, 1, 0), item(2, 1, 0)), ROWS[:2].tobytes())
    assert "not finite" in done.errors[0]
    assert done.errors[1] == ""


def test_dropped_caches_are_freed(tail) -> None:
    tail.step(step(item(1, 2, 0)), ROWS[:2].tobytes())
    done = tail.step(step(item(1, 1, 2), drop=[1]), ROWS[:1].tobytes())
    assert done.errors == ["the cache has 0 tokens, expected 2"]


def test_too_little_memory_is_told_and_changes_no_cache(tail, monkeypatch) -> None:
    tail.step(step(item(1, 2, 0)), ROWS[:2].tobytes())
    with monkeypatch.context() as patch:
        patch.setattr(type(tail._part), "run", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
        done = tail.step(step(item(1, 1, 2)), ROWS[:1].tobytes())
    assert (done.lacks_memory, done.errors) == (True, ["no room"])
    assert tail.step(step(item(1, 1, 2)), ROWS[:1].tobytes()).errors == [""]


def test_the_loop_answers_until_the_server_is_gone(tail) -> None:
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=serve, args=(theirs, tail))
    thread.start()
    with ours, theirs:
        ours.sendall(packed(step(item(1, 6, 0)), ROWS.tobytes()))
        header, _ = sizes_of(ours.recv(HEAD.size, socket.MSG_WAITALL))
        done = parse_header(ours.recv(header, socket.MSG_WAITALL))
        assert isinstance(done, StepDone)
        assert done.errors == [""]
        ours.shutdown(socket.SHUT_RDWR)
        thread.join(30)
        assert not thread.is_alive()


def test_a_stage_that_cannot_be_loaded_is_told(tmp_path) -> None:
    tail, message = load_tail(tmp_path, "numpy", 1)
    assert tail is None
    assert isinstance(message, TailNotLoaded)
    assert "is not a stage" in message.error
    write_stages(tmp_path, 2)
    assert isinstance(load_tail(tmp_path / "tail", "numpy", 1)[1], TailUp)


def test_numpy_computes_where_there_is_no_gpu(monkeypatch, tmp_path) -> None:
    assert [chosen_engine(one) for one in ("numpy", "torch", "torch:cuda")] == ["numpy", "torch", "torch:cuda"]
    monkeypatch.setattr(tail_main, "GPU_FILES", (str(tmp_path / "none"),))
    assert chosen_engine("auto") == "numpy"
    (tmp_path / "driver").touch()
    monkeypatch.setattr(tail_main, "GPU_FILES", (str(tmp_path / "driver"),))
    torch = pytest.importorskip("torch")
    assert chosen_engine("auto") == ("torch:cuda" if torch.cuda.is_available() else "numpy")
