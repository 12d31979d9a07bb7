"""Blocks by hand and by law: attention of one row, caches, rows of several sequences, numpy and torch alike."""

from __future__ import annotations

import numpy as np
import pytest

from edgefl.errors import ConfigError
from edgefl.offload.generation.blocks import (
    EMBEDDING,
    ROTARY,
    DecoderPart,
    Rows,
    numpy_engine,
    tensors_of,
    torch_engine,
)
from edgefl.offload.generation.stage_info import read_stage
from edgefl.trees import SpooledTree
from tests.language_models import SPEC, other_spec, random_state, write_stages

TOKENS = [5, 9, 250, 3, 17, 80, 2]


@pytest.fixture
def whole(tmp_path):
    (info,) = write_stages(tmp_path, None)
    return DecoderPart(info, random_state(), numpy_engine())


def logits_of(part, tokens, pieces):
    cache, seen, at = part.new_cache(), [], 0
    for num in pieces:
        seen.append(part.logits(part.run(part.embed(tokens[at : at + num]), [Rows(cache, num)])))
        at += num
    return np.concatenate(seen)


def test_the_first_token_attends_to_itself_by_hand(tmp_path) -> None:
    """With one token, attention is its own value, and rotation by 0 changes nothing."""
    spec = other_spec(num_blocks=1)
    (info,) = write_stages(tmp_path, None, spec=spec)
    state = random_state(spec)
    part = DecoderPart(info, state, numpy_engine())
    hidden = state[EMBEDDING][7].astype(np.float64)

    def weight(name):
        return state[f"model.layers.0.{name}.weight"].astype(np.float64)

    def normed(values):
        return values / np.sqrt((values**2).mean() + spec.norm_epsilon)

    values = (weight("self_attn.v_proj") @ normed(hidden)).reshape(2, 8)
    hidden = hidden + weight("self_attn.o_proj") @ np.repeat(values, 2, axis=0).reshape(-1)  # two heads share one
    gate, up = weight("mlp.gate_proj") @ normed(hidden), weight("mlp.up_proj") @ normed(hidden)
    hidden = hidden + weight("mlp.down_proj") @ (gate / (1 + np.exp(-gate)) * up)
    seen = part.run(part.embed([7]), [Rows(part.new_cache(), 1)])
    np.testing.assert_allclose(seen[0], hidden, rtol=1e-4, atol=1e-4)


def test_pieces_of_a_prompt_give_what_the_whole_does(whole) -> None:
    expected = logits_of(whole, TOKENS, [7])
    for pieces in ([1] * 7, [3, 4], [6, 1]):
        np.testing.assert_allclose(logits_of(whole, TOKENS, pieces), expected, atol=1e-4)


def test_a_later_token_changes_nothing_before_it(whole) -> None:
    one, other = logits_of(whole, TOKENS, [7]), logits_of(whole, [*TOKENS[:-1], 99], [7])
    np.testing.assert_array_equal(one[:-1], other[:-1])
    assert np.abs(one[-1] - other[-1]).max() > 0.1


def test_rows_of_several_sequences_are_as_alone(whole) -> None:
    prompts = [TOKENS, TOKENS[:2], [200] * 90]
    caches = [whole.new_cache() for _ in prompts]
    rows = [Rows(cache, len(one)) for cache, one in zip(caches, prompts, strict=True)]
    together = whole.logits(whole.run(whole.embed([token for one in prompts for token in one]), rows))
    alone = [logits_of(whole, one, [len(one)]) for one in prompts]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-4)
    assert [cache.length for cache in caches] == [7, 2, 90]
    step = whole.logits(whole.run(whole.embed([1, 2, 3]), [Rows(cache, 1) for cache in caches]))
    for number, (prompt, token) in enumerate(zip(prompts, (1, 2, 3), strict=True)):
        expected = logits_of(whole, [*prompt, token], [len(prompt) + 1])[-1]
        np.testing.assert_allclose(step[number], expected, atol=1e-4)


def test_stages_give_what_the_whole_does_at_every_cut(whole, tmp_path) -> None:
    expected = logits_of(whole, TOKENS, [7])
    for cut in range(SPEC.num_blocks + 1):
        head, tail = (
            DecoderPart(info, {n: state[n] for n in (*names, ROTARY)}, numpy_engine())
            for state in [random_state()]
            for info, names in zip(
                write_stages(tmp_path, cut),
                (tensors_of(state, 0, cut, first=True, last=False), tensors_of(state, cut, 4, first=False, last=True)),
                strict=True,
            )
        )
        hidden = head.run(head.embed(TOKENS), [Rows(head.new_cache(), 7)])
        seen = tail.logits(tail.run(hidden, [Rows(tail.new_cache(), 7)]))
        np.testing.assert_array_equal(seen, expected)


def test_torch_computes_the_same(whole, tmp_path) -> None:
    torch = pytest.importorskip("torch")
    info = read_stage(tmp_path / "whole")
    with torch.no_grad():
        other = DecoderPart(info, SpooledTree(tmp_path / "whole" / "model.safetensors"), torch_engine())
        np.testing.assert_allclose(logits_of(other, TOKENS, [4, 1, 2]), logits_of(whole, TOKENS, [7]), atol=1e-4)


def test_a_cache_grows_with_its_sequence_and_keeps_what_is_in_it(whole) -> None:
    cache = whole.new_cache()
    assert cache.num_bytes == 0
    whole.run(whole.embed([1]), [Rows(cache, 1)])
    assert cache.num_bytes == SPEC.cache_bytes(4)
    whole.run(whole.embed([1]), [Rows(cache, 1)])
    assert cache.num_bytes == 64 * SPEC.cache_bytes(4)
    assert whole.new_cache(10).num_bytes == 10 * SPEC.cache_bytes(4)  # what a tail reserves
    long = [7] * 200
    expected = logits_of(whole, long, [200])
    np.testing.assert_allclose(logits_of(whole, long, [1] * 200), expected, atol=1e-4)


def test_missing_wrong_and_unknown_tensors_are_refused(tmp_path) -> None:
    (info,) = write_stages(tmp_path, None)
    state = random_state()
    for name, value, words in (
        (EMBEDDING, None, "model.embed_tokens.weight is missing"),
        ("model.norm.weight", np.ones(3, np.float32), r"of shape \[3\]; expected shape \[32\]"),
        ("model.layers.0.self_attn.k_proj.weight", None, "only 2 of the tensors"),
        ("model.layers.1.mlp.gate.weight", np.ones(3, np.float32), "cannot compute with: model.layers.1.mlp.gate"),
    ):
        changed = {key: one for key, one in state.items() if key != name}
        with pytest.raises(ConfigError, match=words):
            DecoderPart(info, changed if value is None else {**changed, name: value}, numpy_engine())
