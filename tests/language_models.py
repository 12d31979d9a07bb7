"""A small decoder with random weights as stage folders, and a tokenizer of bytes; without transformers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edgefl.offload.generation.blocks import EMBEDDING, HEAD, NORM, ROTARY, tensors_of
from edgefl.offload.generation.stage_info import (
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    DecoderSpec,
    StageInfo,
    TextFacts,
    sha256_of,
    write_stage,
)
from edgefl.trees import write_tree

SPEC = DecoderSpec(
    hidden=32, heads=4, kv_heads=2, head_size=8, vocabulary=260, context=256, num_blocks=4, norm_epsilon=1e-5
)
END = 260  # no token: texts have the length that was asked for
CHAT = "{% for one in messages %}<{{ one.role }}>{{ one.content }}\n{% endfor %}<assistant>"


def random_state(spec=SPEC, seed=0):
    """Return all tensors of a decoder; its tokens vary, as the weights are large."""
    rng = np.random.default_rng(seed)

    def matrix(*shape):
        return rng.normal(0, 1 / np.sqrt(shape[-1]), shape).astype(np.float32)

    heads, keys = spec.heads * spec.head_size, spec.kv_heads * spec.head_size
    state = {
        EMBEDDING: matrix(spec.vocabulary, spec.hidden) * 4,
        NORM: np.ones(spec.hidden, np.float32),
        HEAD: matrix(spec.vocabulary, spec.hidden) * 2,
        ROTARY: (10_000.0 ** -(np.arange(0, spec.head_size, 2) / spec.head_size)).astype(np.float32),
    }
    for number in range(spec.num_blocks):
        block, dense = f"model.layers.{number}.", 2 * spec.hidden
        state |= {
            f"{block}input_layernorm.weight": np.ones(spec.hidden, np.float32),
            f"{block}self_attn.q_proj.weight": matrix(heads, spec.hidden) * 2,
            f"{block}self_attn.k_proj.weight": matrix(keys, spec.hidden) * 2,
            f"{block}self_attn.v_proj.weight": matrix(keys, spec.hidden),
            f"{block}self_attn.o_proj.weight": matrix(spec.hidden, heads),
            f"{block}post_attention_layernorm.weight": np.ones(spec.hidden, np.float32),
            f"{block}mlp.gate_proj.weight": matrix(dense, spec.hidden),
            f"{block}mlp.up_proj.weight": matrix(dense, spec.hidden),
            f"{block}mlp.down_proj.weight": matrix(spec.hidden, dense),
        }
    return state


def write_stages(folder, cut=2, *, spec=SPEC, seed=0, name="tiny"):
    """Write `head` and `tail`, or `whole` without a cut; return their records."""
    state, num = random_state(spec, seed), spec.num_blocks
    borders = [("whole", 0, num)] if cut is None else [("head", 0, cut), ("tail", cut, num)]
    infos = []
    for at in reversed(range(len(borders))):
        part, start, end = borders[at]
        first, last = at == 0, at == len(borders) - 1
        into = folder / part
        into.mkdir(parents=True, exist_ok=True)
        own = {one: state[one] for one in (*tensors_of(state, start, end, first=first, last=last), ROTARY)}
        with (into / WEIGHTS_FILE).open("wb") as file:
            write_tree(own, file)
        if first:
            (into / TOKENIZER_FILE).write_text(byte_tokenizer(), encoding="utf-8")
        info = StageInfo(
            name=name, spec=spec, start=start, end=end, digest=sha256_of(into / WEIGHTS_FILE),
            weight_bytes=sum(one.nbytes for one in own.values()), tail_digest=infos[0].digest if infos else "",
            tokenizer_digest=sha256_of(into / TOKENIZER_FILE) if first else "",
            text=TextFacts(chat_template=CHAT, end_tokens=(END,)) if first else TextFacts(),
        )  # fmt: skip
        write_stage(into, info)
        infos.insert(0, info)
    return infos


def byte_tokenizer():
    """Return a tokenizer.json with one token for each byte, and an end."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<unused>"), AddedToken("<end>"), AddedToken("<a>"), AddedToken("<b>")])
    return tokenizer.to_str()


def other_spec(**changes):
    """Return the spec with changes."""
    return dataclasses.replace(SPEC, **changes)


def smollm2(get):
    """Return what `benchmarks.generation_model` gets of SmolLM2; the test is skipped if no index has the model."""
    from benchmarks.generation_model import NoModel

    try:
        return get()
    except NoModel as reason:
        pytest.skip(f"SmolLM2 is not to be had: {reason}")
