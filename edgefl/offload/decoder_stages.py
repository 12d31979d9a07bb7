"""Stages of a decoder of transformers, by its blocks and without tracing: embedding | blocks i..j | norm and head.

Any model whose base has `embed_tokens`, `layers` and `norm`, and takes `inputs_embeds` (Llama, Mistral, Qwen, SmolLM).
Each stage has a cache of keys and values of its own: its blocks count from 0 in it (`layer_idx`), while their state
keeps the names that it has in the whole model. A head that is tied to the embedding is in the first and in the last
stage; the copies are told by `tied`.
A base that does more to its inputs than to call its blocks (Gemma scales them) would do that in each stage:
`check_decoder` compares stages with the whole and refuses them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from edgefl.errors import ConfigError, MissingExtra, ParityError

if TYPE_CHECKING:
    import torch

_BASE, _EMBEDDING, _BLOCKS, _NORM, _HEAD = "model", "embed_tokens", "layers", "norm", "lm_head"
_LAYER = "layer_idx"
_ALLOWED = 1e-4  # of the largest logit: float32, in another order of matrix products

Send = Callable[["torch.Tensor"], "torch.Tensor"]  # hidden states -> as they arrive


class DecoderStage:
    """Blocks `start` to `end` of a decoder, with the embedding if it is the first, norm and head if it is the last."""

    def __init__(self, model: torch.nn.Module, start: int, end: int, *, is_first: bool, is_last: bool) -> None:
        import torch

        base = getattr(model, _BASE)
        self.start, self.end, self.is_first, self.is_last = start, end, is_first, is_last
        self.embedding = copy.deepcopy(getattr(base, _EMBEDDING)) if is_first else None
        self.head = copy.deepcopy(getattr(model, _HEAD)) if is_last else None
        self.norm = copy.deepcopy(getattr(base, _NORM)) if is_last else None
        blocks = copy.deepcopy(torch.nn.ModuleList(getattr(base, _BLOCKS)[start:end]))
        for at, block in enumerate(blocks):
            for module in block.modules():
                if hasattr(module, _LAYER):
                    setattr(module, _LAYER, at)
        config = copy.deepcopy(base.config)
        config.num_hidden_layers = end - start
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[start:end]
        self.config = config
        self._base = _without_parts(base)
        self._base.config = config
        setattr(self._base, _BLOCKS, blocks)

    def new_cache(self) -> Any:
        """Return an empty cache for the blocks of this stage."""
        try:
            from transformers import DynamicCache
        except ImportError as cause:
            raise MissingExtra("a language model in stages", "offload") from cause
        return DynamicCache(config=self.config)

    def run(self, given: torch.Tensor, cache: Any = None) -> torch.Tensor:
        """Return hidden states (N, T, D), or logits (N, T, V) of the last stage.

        `given` are tokens (N, T) for the first stage, else hidden states. With a cache, they follow what is in it.
        """
        hidden = given if self.embedding is None else self.embedding(given)
        if self.end > self.start:
            found = self._base(inputs_embeds=hidden, past_key_values=cache, use_cache=cache is not None)
            hidden = found.last_hidden_state
        if self.norm is not None and self.head is not None:
            hidden = self.head(self.norm(hidden))
        return hidden

    @property
    def blocks(self) -> torch.nn.ModuleList:
        """The stage's blocks."""
        found: torch.nn.ModuleList = getattr(self._base, _BLOCKS)
        return found

    def state(self) -> dict[str, torch.Tensor]:
        """Return the stage's tensors by their names in the whole model: embedding, norm and head, then the blocks'."""
        parts = {f"{_BASE}.{_EMBEDDING}": self.embedding, f"{_BASE}.{_NORM}": self.norm, _HEAD: self.head}
        parts |= {f"{_BASE}.{_BLOCKS}.{at + self.start}": block for at, block in enumerate(self.blocks)}
        return {
            f"{part}.{name}": one
            for part, module in parts.items()
            if module is not None
            for name, one in module.state_dict().items()
        }


def split_decoder(model: torch.nn.Module, cuts: Sequence[int]) -> list[DecoderStage]:
    """Split a decoder behind so many blocks: `[6]` = embedding and blocks 0..5, then blocks 6.. with norm and head.

    A cut at 0 leaves the embedding alone, one at the number of blocks the norm and the head. The model is not changed.
    Raises ConfigError for a model of another kind, and for cuts out of range or order.
    """
    base = getattr(model, _BASE, None)
    missing = [one for one in (_EMBEDDING, _BLOCKS, _NORM) if not hasattr(base, one)]
    missing += [] if hasattr(model, _HEAD) else [_HEAD]
    if missing:
        raise ConfigError(
            f"{type(model).__name__} has no {', '.join(missing)}; expected a decoder of transformers such as "
            "LlamaForCausalLM. Split another module with edgefl.offload.torch_stages, or its ONNX file"
        )
    num = len(getattr(base, _BLOCKS))
    if not cuts or list(cuts) != sorted(set(cuts)) or cuts[0] < 0 or cuts[-1] > num:
        raise ConfigError(f"cuts {list(cuts)} must be different numbers of blocks in growing order, from 0 to {num}")
    ends = [0, *cuts, num]
    last = len(cuts)
    return [
        DecoderStage(model, start, end, is_first=at == 0, is_last=at == last)
        for at, (start, end) in enumerate(pairwise(ends))
    ]


def tied(model: torch.nn.Module) -> bool:
    """Whether the head is the embedding: then the first and the last stage both have it."""
    same: bool = getattr(model, _HEAD).weight is getattr(getattr(model, _BASE), _EMBEDDING).weight
    return same


def generate(stages: Sequence[DecoderStage], tokens: torch.Tensor, num: int, send: Send | None = None) -> torch.Tensor:
    """Return `num` more tokens (N, num), greedily, with a cache of each stage; `send` is the link at each cut."""
    import torch

    caches, given, found = [one.new_cache() for one in stages], tokens, []
    with torch.no_grad():
        for _ in range(num):
            logits = _through(stages, given, caches, send)
            given = logits[:, -1:].argmax(-1)
            found.append(given)
    return torch.cat(found, 1)


def check_decoder(model: torch.nn.Module, stages: Sequence[DecoderStage], tokens: torch.Tensor) -> float:
    """Return by how much the stages' logits differ from the model's, relative to the largest.

    Raises ParityError if that is more than the arithmetic explains.
    """
    import torch

    with torch.no_grad():
        wanted = model.eval()(input_ids=tokens, use_cache=False).logits
        seen = _through(stages, tokens, [None] * len(stages), None)
    difference = float((wanted - seen).abs().max()) / max(1e-12, float(wanted.abs().max()))
    if not difference <= _ALLOWED:
        raise ParityError(
            f"{type(model).__name__} in {len(stages)} stages differs by {difference:.3g} of its largest logit, "
            f"allowed: {_ALLOWED:g}. Its base does more than to call its blocks, and each stage repeats it"
        )
    return difference


def _through(
    stages: Sequence[DecoderStage], tokens: torch.Tensor, caches: Sequence[Any], send: Send | None
) -> torch.Tensor:
    hidden = tokens
    for stage, cache in zip(stages, caches, strict=True):
        hidden = stage.run(hidden if stage.is_first or send is None else send(hidden), cache)
    return hidden


def _without_parts(base: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of the base without its embedding and its blocks, whose norm does nothing."""
    import torch

    own = copy.copy(base)
    own._modules = {  # noqa: SLF001 - a shallow copy shares this dict with its source
        name: copy.deepcopy(one) for name, one in base.named_children() if name not in {_EMBEDDING, _BLOCKS, _NORM}
    }
    setattr(own, _EMBEDDING, None)
    setattr(own, _NORM, torch.nn.Identity())
    return own
