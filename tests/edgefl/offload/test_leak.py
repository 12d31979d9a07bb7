"""Attacks read what can be read, and only that."""

from __future__ import annotations

import numpy as np
import pytest

from edgefl.errors import ConfigError
from edgefl.offload.graph import read_graph
from edgefl.offload.leak import embedding_of, leak_of, ssim, variance
from tests.edgefl.offload.graphs import node, residual, value, weight, write

RNG = np.random.default_rng(0)


def smooth(num, side=8):
    coarse = RNG.normal(size=(num, 1, 3, 3)).repeat(3, 2).repeat(3, 3)[:, :, :side, :side]
    return coarse.astype(np.float32)


@pytest.fixture
def graph(tmp_path):
    return read_graph(residual(tmp_path / "m.onnx"))


def test_ssim_by_hand():
    """Two constant windows: (2ab + c) / (a^2 + b^2 + c) with c = (0.01 * span)^2; the variances are equal, so 1."""
    one = np.zeros((1, 1, 7, 7), np.float32)
    one[..., 0] = 1.0
    assert ssim(one, one) == 1.0
    mean, span = 1 / 7, 1.0
    small = (0.01 * span) ** 2
    wanted = (2 * mean * (mean + 0.5) + small) / (mean**2 + (mean + 0.5) ** 2 + small)
    assert ssim(one, one + 0.5) == pytest.approx(wanted, rel=1e-6)
    assert ssim(one, 2 * mean - one) < -0.9  # the same mean, the opposite of each deviation


def test_variance_by_hand():
    truth = np.array([[0.0], [2.0]])
    assert variance(truth, truth) == 1.0
    assert variance(truth, np.ones((2, 1))) == 0.0
    assert variance(truth, np.array([[0.0], [1.0]])) == 0.5
    assert variance(truth, 9 * truth) == 0.0


def test_pictures_behind_an_invertible_map_are_read_and_noise_is_not(graph):
    pictures = smooth(60)
    mixed = pictures.reshape(60, 64) @ RNG.normal(size=(64, 64)).astype(np.float32)
    open_, closed = (
        leak_of(graph, {"h": one}, {"x": pictures}) for one in (mixed, RNG.normal(size=(60, 64)).astype(np.float32))
    )
    assert (open_.measure, open_.attack, open_.num_samples) == ("SSIM", "linear map", 30)
    assert open_.value > 0.95
    assert closed.value < closed.blind + 0.15
    assert open_.as_json()["samples"] == 30


def test_a_decoder_reads_what_a_linear_map_cannot(graph):
    """A map of |x| and its sign, apart in channels: their product is x, and no linear map makes it."""
    pictures = smooth(200)
    sign = np.sign(pictures)
    seen = {"h": np.concatenate([np.abs(pictures) + 0.1 * sign, sign], 1).astype(np.float32)}
    found = leak_of(graph, seen, {"x": pictures})
    assert found.attack == "decoder"
    assert found.value > 0.7


def test_tokens_are_read_from_their_embeddings_and_from_a_rotation(tmp_path):
    nodes = [node("Gather", "table tokens", "h"), node("MatMul", "h turn", "y")]
    turn = np.linalg.qr(RNG.normal(size=(16, 16)))[0].astype(np.float32)
    from onnx import numpy_helper

    path = write(tmp_path / "m.onnx", nodes, [value("tokens", ("n", "t"), 7)], [value("y", ("n", "t", 16))],
                 [weight("table", 40, 16), numpy_helper.from_array(turn, "turn")])  # fmt: skip
    graph = read_graph(path)
    table = embedding_of(graph, "tokens")
    tokens = RNG.integers(0, 40, (20, 30))
    near = leak_of(graph, {"h": table[tokens]}, {"tokens": tokens})
    assert (near.measure, near.value) == ("tokens", 1.0)
    turned = leak_of(graph, {"y": table[tokens] @ turn}, {"tokens": tokens})
    assert (turned.attack, turned.value > 0.95) == ("linear map to embeddings", True)
    few = leak_of(graph, {"y": np.eye(40, dtype=np.float32)[tokens]}, {"tokens": tokens})
    assert few.value == 1.0
    noise = leak_of(graph, {"y": RNG.normal(size=(20, 30, 16)).astype(np.float32)}, {"tokens": tokens})
    assert noise.value < 0.2
    assert near.blind < 0.1


def test_an_input_that_is_sent_leaks_whole(graph):
    x = RNG.normal(size=(20, 4)).astype(np.float32)
    assert leak_of(graph, {"x": x}, {"x": x}).value == 1.0
    found = leak_of(graph, {"n": np.arange(20)}, {"x": x})  # no floats: nothing to attack
    assert (found.value, found.attack, found.measure) == (found.blind, "guess", "variance")


def test_few_samples_are_refused(graph):
    with pytest.raises(ConfigError, match="at least 16 samples, got 15"):
        leak_of(graph, {}, {"x": np.zeros((15, 4), np.float32)})
