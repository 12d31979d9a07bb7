"""A small Llama with random weights in stages: logits, caches, names and ties as in the whole model."""

from __future__ import annotations

import pytest
import torch

from edgefl.errors import ConfigError, ParityError
from edgefl.offload.decoder_stages import check_decoder, generate, split_decoder, tied
from edgefl.offload.torch_stages import merge_states
from edgefl.offload.wire import through

TOKENS = torch.tensor([[1, 5, 9, 2], [7, 7, 3, 4]])


def make(ties):
    transformers = pytest.importorskip("transformers", reason="needs the [offload] extra")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=ties, initializer_range=0.5,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("ties", [False, True])
def test_every_cut_computes_the_same_and_merges_back(ties):
    model = make(ties)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    assert tied(model) is ties
    for cuts in ([0], [1], [2], [3], [1, 2]):
        stages = split_decoder(model, cuts)
        assert check_decoder(model, stages, TOKENS) < 1e-5
        merged = merge_states(*(one.state() for one in stages))
        assert merged.keys() == before.keys()
        assert all(torch.equal(one, before[name]) for name, one in merged.items())
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert [one.self_attn.layer_idx for one in model.model.layers] == [0, 1, 2]


def test_tokens_are_generated_with_a_cache_of_each_stage():
    model = make(ties=True)
    whole = model.generate(TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    for cuts in ([1], [1, 2], [0], [3]):
        stages = split_decoder(model, cuts)
        assert torch.equal(generate(stages, TOKENS, 6), whole[:, 4:])
    sent = []

    def send(hidden):
        sent.append(tuple(hidden.shape))
        return torch.from_numpy(through({"h": hidden.numpy()}, "fp16")["h"])

    assert generate(split_decoder(model, [1]), TOKENS, 3, send).shape == (2, 3)
    assert sent == [(2, 4, 16), (2, 1, 16), (2, 1, 16)]  # after the first, one token crosses


def test_a_tied_weight_is_in_the_first_and_the_last_stage():
    first, last = split_decoder(make(ties=True), [1])
    assert "model.embed_tokens.weight" in first.state()
    assert "lm_head.weight" in last.state()
    assert "model.layers.1.mlp.up_proj.weight" in last.state()
    assert "model.layers.0.mlp.up_proj.weight" not in last.state()


def test_what_is_no_decoder_or_no_cut_is_refused():
    with pytest.raises(ConfigError, match="Linear has no embed_tokens, layers, norm, lm_head"):
        split_decoder(torch.nn.Linear(1, 1), [1])
    for cuts in ([], [4], [-1], [2, 1], [1, 1]):
        with pytest.raises(ConfigError, match="in growing order, from 0 to 3"):
            split_decoder(make(ties=False), cuts)


def test_a_base_that_scales_its_inputs_is_refused():
    model = make(ties=False)
    model.model.register_forward_pre_hook(
        lambda _module, args, given: (args, {**given, **_scaled(given)}), with_kwargs=True
    )
    with pytest.raises(ParityError, match="in 2 stages differs by"):
        check_decoder(model, split_decoder(model, [1]), TOKENS)


def _scaled(given):
    return {"inputs_embeds": 3 * given["inputs_embeds"]} if given.get("inputs_embeds") is not None else {}
