"""Models of transformers as stages: logits and tokens of the whole, kinds of decoders, and what is refused."""

from __future__ import annotations

import pytest
import torch

from edgefl.errors import ConfigError, ParityError
from edgefl.offload.generation.blocks import numpy_engine
from edgefl.offload.generation.generate import generate, load_part
from edgefl.offload.generation.language_model import LanguageModel
from edgefl.offload.generation.sampling import Sampling
from edgefl.offload.generation.splitting import split_language_model
from edgefl.offload.generation.stage_info import TextFacts
from tests.language_models import byte_tokenizer

transformers = pytest.importorskip("transformers", reason="needs the [offload] extra")
SIZES = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.4,
}  # fmt: skip
PROMPT = list(b"hello")


def make(kind="Llama", name="", **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | changes)
    module = getattr(transformers, name or f"{kind}ForCausalLM")(config).eval()
    return LanguageModel(name="m", module=module, tokenizer=byte_tokenizer(), text=TextFacts(end_tokens=(2,)))


def tokens_of(model, num):
    made = model.module.generate(
        torch.tensor([PROMPT]), max_new_tokens=num, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return made[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {"tie_word_embeddings": True}),
        ("Llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                    "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}),
        ("Mistral", {"sliding_window": None}),
        ("Qwen2", {}),  # biases
        ("Qwen3", {"head_dim": 16}),  # norms of queries and keys
    ],
)  # fmt: skip
def test_stages_of_a_decoder_generate_its_tokens(tmp_path, kind, changes) -> None:
    model = make(kind, **changes)
    expected = tokens_of(model, 12)
    head, tail = split_language_model(model, 1, tmp_path)
    assert (head.tail_digest, tail.start, tail.end) == (tail.digest, 1, 3)
    parts = [load_part(tmp_path / one, numpy_engine()) for one in ("head", "tail")]
    assert list(generate(parts, PROMPT, 12, Sampling())) == expected
    (whole,) = split_language_model(model, None, tmp_path)
    assert list(generate([load_part(tmp_path / "whole", numpy_engine())], PROMPT, 12, Sampling())) == expected
    if changes.get("tie_word_embeddings"):  # it is in both stages, and once in the whole
        embedding = 4 * 260 * 32
        assert head.weight_bytes + tail.weight_bytes - whole.weight_bytes == embedding + 4 * 4


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: make(hidden_act="gelu"), "hidden_act 'gelu'"),
        (lambda: make("Mistral", sliding_window=8), "sliding_window 8"),
        (
            lambda: make("GPT2", "GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0),
            "GPT2LMHeadModel cannot be split for generation",
        ),
    ],
)
def test_decoders_of_other_kinds_are_refused(tmp_path, model, words) -> None:
    with pytest.raises(ConfigError, match=words):
        split_language_model(model(), 1, tmp_path)


def test_a_model_that_does_more_is_refused(tmp_path) -> None:
    model = make()
    model.module.model.norm.register_forward_hook(lambda _module, _args, made: made * 1.5)
    with pytest.raises(ParityError, match="differ from the whole model by"):
        split_language_model(model, 1, tmp_path)


def test_cuts_that_do_not_exist_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="must be a number of blocks from 0 to 3, which m has"):
        split_language_model(make(), 4, tmp_path)
