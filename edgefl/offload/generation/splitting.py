"""Write a language model as stage folders: a head for the device and a tail for the cloud, or the whole for one.

What the stages compute is compared with the model before they can be used, so a model that does more than
`edgefl.offload.generation.blocks` does is refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgefl.errors import ConfigError, ParityError
from edgefl.offload.generation.blocks import EMBEDDING, HEAD, ROTARY, Rows, numpy_engine, tensors_of
from edgefl.offload.generation.generate import load_part
from edgefl.offload.generation.language_model import ALLOWED, TRIED_TOKENS, LanguageModel, difference, logits_of
from edgefl.offload.generation.stage_info import (
    CHANGES_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    DecoderSpec,
    StageInfo,
    TextFacts,
    sha256_of,
    write_stage,
)
from edgefl.trees import Array, EncodedTree, write_tree
from edgefl.trees.factors import MARK, factor_names
from edgefl.trees.tensors import array_of

HEAD_FOLDER, TAIL_FOLDER, WHOLE_FOLDER = "head", "tail", "whole"


def split_language_model(model: LanguageModel, cut: int | None, folder: Path) -> list[StageInfo]:
    """Write FOLDER/head and FOLDER/tail, cut behind `cut` blocks, or FOLDER/whole without a cut; return the records.

    Raises ConfigError for a model of another kind or a cut out of range, ParityError if the stages compute anything
    else than the model.
    """
    spec, state = _spec(model.module), _state(model.module)
    num = spec.num_blocks
    if cut is not None and not 0 <= cut <= num:
        raise ConfigError(f"--cut {cut} must be a number of blocks from 0 to {num}, which {model.name} has")
    borders = [(0, num)] if cut is None else [(0, cut), (cut, num)]
    names = [WHOLE_FOLDER] if cut is None else [HEAD_FOLDER, TAIL_FOLDER]
    infos: list[StageInfo] = []
    for at in reversed(range(len(borders))):  # a head names its tail's digest
        start, end = borders[at]
        last = at == len(borders) - 1
        into = folder / names[at]
        if into.exists():
            shutil.rmtree(into)
        into.mkdir(parents=True)
        own = {name: state[name] for name in tensors_of(state, start, end, first=at == 0, last=last)}
        if at == 0 and last and np.array_equal(own[EMBEDDING], own[HEAD]):
            own.pop(HEAD)  # tied
        own[ROTARY] = state[ROTARY]
        with (into / WEIGHTS_FILE).open("wb") as file:
            write_tree(own, file)
        _write_changes(model, own, into / CHANGES_FILE)
        if at == 0:
            (into / TOKENIZER_FILE).write_text(model.tokenizer, encoding="utf-8")
        info = StageInfo(
            name=model.name, spec=spec, start=start, end=end, digest=sha256_of(into / WEIGHTS_FILE),
            weight_bytes=sum(one.nbytes for one in own.values()), tail_digest=infos[0].digest if infos else "",
            tokenizer_digest=sha256_of(into / TOKENIZER_FILE) if at == 0 else "",
            text=model.text if at == 0 else TextFacts(),
        )  # fmt: skip
        write_stage(into, info)
        infos.insert(0, info)
    _check_parity(model, [folder / name for name in names])
    return infos


def _write_changes(model: LanguageModel, own: Mapping[str, Array], file: Path) -> None:
    """Write the adapters that were added to a stage's weights, if there are any: a release on its base needs them."""
    stored = {
        side: array
        for name, pair in model.changes.items()
        if name in own
        for side, array in zip(factor_names(name + MARK), (pair.left, pair.right), strict=True)
    }
    if stored:
        with file.open("wb") as opened:
            write_tree(EncodedTree(stored), opened)


def _spec(module: Any) -> DecoderSpec:
    config = module.config
    try:
        hidden, heads = config.hidden_size, config.num_attention_heads
        unknown = [
            f"{name} {value!r}"
            for name, value, known in (
                ("hidden_act", config.hidden_act, {"silu", "swish"}),
                ("sliding_window", _window(config), {None}),
            )
            if value not in known
        ]
        rotary = module.model.rotary_emb
        spec = DecoderSpec(
            hidden=hidden, heads=heads, kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_size=getattr(config, "head_dim", None) or hidden // heads, vocabulary=config.vocab_size,
            context=config.max_position_embeddings, num_blocks=config.num_hidden_layers,
            norm_epsilon=config.rms_norm_eps, rotary_scale=float(getattr(rotary, "attention_scaling", 1.0)),
        )  # fmt: skip
    except AttributeError as cause:
        raise ConfigError(
            f"{type(module).__name__} cannot be split for generation: {cause}. Expected a decoder like Llama, Mistral "
            "or Qwen"
        ) from cause
    if unknown:
        raise ConfigError(f"{type(module).__name__} has {', '.join(unknown)}, with which stages cannot compute yet")
    return spec


def _window(config: Any) -> Any:
    types = getattr(config, "layer_types", None)
    if types is not None:
        return next((one for one in types if one != "full_attention"), None)
    return getattr(config, "sliding_window", None)


def _state(module: Any) -> dict[str, Array]:
    state = {name: array_of(one.detach()).astype(np.float32, copy=False) for name, one in module.state_dict().items()}
    state[ROTARY] = array_of(module.model.rotary_emb.inv_freq.detach()).astype(np.float32)
    unknown = [name for name in state if not name.startswith("model.layers.") and name not in {*_ENDS, ROTARY}]
    if unknown:
        raise ConfigError(
            f"{type(module).__name__} has tensors with which stages cannot compute: {', '.join(unknown[:5])}"
        )
    return state


_ENDS = frozenset({EMBEDDING, HEAD, "model.norm.weight"})


def _check_parity(model: LanguageModel, folders: Sequence[Path]) -> None:
    """Raise ParityError unless the stages give the model's logits, for a prompt and a next token."""
    module: Any = model.module
    tokens = np.random.default_rng(0).integers(0, module.config.vocab_size, TRIED_TOKENS)
    wanted = logits_of(module, tokens)
    seen: list[Array] = []
    parts = [load_part(one, numpy_engine()) for one in folders]
    caches = [part.new_cache() for part in parts]
    for some in (tokens[:8], tokens[8:11], tokens[11:]):
        hidden = parts[0].embed(some.tolist())
        for part, cache in zip(parts, caches, strict=True):
            hidden = part.run(hidden, [Rows(cache, len(some))])
        seen.append(parts[-1].logits(hidden))
    differ = difference(wanted, np.concatenate(seen))
    if not differ <= ALLOWED:
        raise ParityError(
            f"the stages of {model.name} differ from the whole model by {differ:.3g} of its largest logit, "
            f"allowed: {ALLOWED:g}. {type(model.module).__name__} computes more than these stages do"
        )
