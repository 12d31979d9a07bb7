"""Parts of a decoder of transformers, by its blocks and without tracing: embedding and blocks | blocks | norm and head.

A cut is a number of blocks (`6`), or the last block's name (`model.layers.5`). With a second cut the norm and the head
are on the device, beside the embedding, and a weight that both share is one tensor there.
Tokens are without padding, or padded by a token that the loss ignores: there is no mask.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgefl.errors import ConfigError
from edgefl.offload.decoder_stages import DecoderStage, split_decoder
from edgefl.offload.training.parts import INPUT, LayerRange, ModelParts, Values
from edgefl.offload.training.traced import one_name_each

if TYPE_CHECKING:
    import torch

_HIDDEN, _LOGITS = "hidden", "logits"
_BLOCK = re.compile(r"model\.layers\.(\d+)")


class DecoderLayers:
    """A stage of a decoder as a function of the model's state."""

    def __init__(self, stage: DecoderStage, at: int, names: Mapping[str, str], *, trains: bool = True) -> None:
        self.needs = [f"{INPUT}.0" if stage.is_first else f"{_HIDDEN}.{at}"]
        self.gives = [_LOGITS if stage.is_last else f"{_HIDDEN}.{at + 1}"]
        self._module = _module_of(stage).train(trains)
        self._names = {inner: names[whole] for inner, whole in zip(_inner_names(stage), stage.state(), strict=True)}
        self.tensors = list(dict.fromkeys(self._names.values()))

    def run(self, state: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> Values:
        from torch.func import functional_call

        tensors = {inner: state[name] for inner, name in self._names.items()}
        return {self.gives[0]: functional_call(self._module, tensors, (values[self.needs[0]],))}


def is_decoder(model: Any) -> bool:
    """Whether a model is cut by its blocks."""
    base = getattr(model, "model", None)
    return all(hasattr(base, one) for one in ("embed_tokens", "layers", "norm")) and hasattr(model, "lm_head")


def decoder_parts(
    model: torch.nn.Module, cut: str, last_cut: str = "", *, frozen: bool = False,
    names: Mapping[str, str] | None = None,
) -> ModelParts:  # fmt: skip
    """Return the parts of a decoder, for tokens of any shape (N, T); raises ConfigError for cuts that it lacks.

    `frozen`: the first part runs as in evaluation. `names` are those of its tensors in the whole model, by its own.
    Stages are copies of the model's structure; their tensors may be on the meta device, since each run brings a state.
    """
    cuts = [_number(one) for one in (cut, last_cut) if one]
    stages, names = split_decoder(model.train(), cuts), names or one_name_each(model)
    parts: list[LayerRange] = [
        DecoderLayers(stage, at, names, trains=at > 0 or not frozen) for at, stage in enumerate(stages)
    ]
    return ModelParts(parts=parts, outputs=_as_output)


def _number(cut: str) -> int:
    if cut.isdecimal():
        return int(cut)
    if (found := _BLOCK.fullmatch(cut)) is not None:
        return int(found[1]) + 1
    raise ConfigError(f"train.split.cut={cut!r}: a decoder is cut behind so many blocks (6), or model.layers.5")


def _as_output(values: Mapping[str, torch.Tensor]) -> Any:
    """Return the logits as the model returns them, for the task's loss."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    logits: Any = values[_LOGITS]
    return CausalLMOutputWithPast(logits=logits)


def _module_of(stage: DecoderStage) -> torch.nn.Module:
    """Return a module that runs the stage, so that its tensors can be replaced in a call."""
    import torch

    class StageModule(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, module in _modules(stage).items():
                setattr(self, name, module)

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return stage.run(given)

    return StageModule()


def _modules(stage: DecoderStage) -> dict[str, Any]:
    found = {"embedding": stage.embedding, "norm": stage.norm, "head": stage.head}
    return {name: one for name, one in found.items() if one is not None} | {"blocks": stage.blocks}


def _inner_names(stage: DecoderStage) -> list[str]:
    """Return the names in the module of `_module_of`, in the order of the stage's state."""
    modules = _modules(stage)
    blocks = modules.pop("blocks")
    names = [f"{part}.{name}" for part, module in modules.items() for name in module.state_dict()]
    return names + [f"blocks.{at}.{name}" for at, block in enumerate(blocks) for name in block.state_dict()]
