"""What a job has learnt, put into a language model before it is split: adapters, and weights that were trained whole.

A job's tensors have the names of its task's model, which may have the language model inside (peft's wrapper, a module
of the task's own): they are found by the end of their names. Matrices of low rank, `PATH@lora`, are added to the
weights `PATH.weight`, all other tensors replace those of the model. Sums are made as devices make them of a patch
(`edgefl.models.adapters.patch`), bit for bit, so a device that has the base fetches the adapters alone.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgefl.errors import ConfigError, MissingExtra, ParityError
from edgefl.models.adapters.patch import added
from edgefl.offload.generation.language_model import ALLOWED, TRIED_TOKENS, LanguageModel, difference, logits_of
from edgefl.trees import Array, Factors, SpooledTree, Tree, factors_of
from edgefl.trees.factors import MARK, is_low_rank
from edgefl.trees.tensors import array_of, tensor_of

if TYPE_CHECKING:
    import torch

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FACTOR = re.compile(r"\.lora_(embedding_)?[AB]\.")
# In a module that is trained whole beside adapters, peft has the original, too.
_SAVED, _ORIGINAL = re.compile(r"\.modules_to_save\.[^.]+\."), ".original_module."
_SHA256 = re.compile(r"[0-9a-f]{64}")


def with_learnt(model: LanguageModel, parameters: Path | None = None, adapter: Path | None = None) -> LanguageModel:
    """Return the model with a job's parameters, or with an adapter; without both as it is. Raises as those do."""
    if parameters is not None and adapter is not None:
        raise ConfigError("give either --parameters or --adapter: a job's parameters have its adapters already")
    if parameters is not None:
        return with_parameters(model, parameters)
    return model if adapter is None else with_adapter(model, adapter)


def with_parameters(model: LanguageModel, file: Path) -> LanguageModel:
    """Return the model with the parameters that a job has made, as `edgefl run --out` writes them.

    The model's weights are changed in place. Raises ConfigError for parameters of another model, or that are not
    finite, ProtocolError for a file that is no tree.
    """
    return _with_tree(model, SpooledTree(file), str(file))


def with_adapter(model: LanguageModel, folder: Path) -> LanguageModel:
    """Return the model with an adapter in peft's format (adapter_config.json), in place.

    Raises ConfigError for an adapter of another model, that is more than a sum of products, or of which anything would
    be lost; MissingExtra.
    """
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise ConfigError(
                f"{folder} is no adapter of peft: it has no {name}. `edgefl models adapter` writes such folders; "
                "for the file of a job's parameters use --parameters"
            )
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as cause:
        raise MissingExtra("reading an adapter of peft", "lora") from cause
    from edgefl.training.adapters import adapters_of, with_factors

    what = f"the adapter in {folder}"
    stored = SpooledTree(folder / ADAPTER_WEIGHTS)
    for name in stored:
        _checked(stored[name], name, what)
    module: Any = model.module
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys that are missing: refused below
            wrapped: Any = PeftModel.from_pretrained(module, str(folder.absolute()), is_trainable=True).eval()
        known = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        adapters = adapters_of(model.name, wrapped)
    except Exception as cause:  # a damaged file, in whatever way peft, torch or re notice it
        raise ConfigError(f"{what} cannot be put into {model.name}: {cause}") from cause
    config = wrapped.peft_config[wrapped.active_adapter]
    _refuse_lost(what, config, stored, known, wrapped.state_dict())
    weights = {one.weight: one.layer.get_base_layer().weight for one in adapters}
    _refuse_other_base(model, folder, config.revision, weights)
    tokens = np.random.default_rng(0).integers(0, module.config.vocab_size, TRIED_TOKENS)
    wanted, products = logits_of(wrapped, tokens), with_factors(adapters, {})
    made = _with_tree(dataclasses.replace(model, module=wrapped.unload()), products, what, is_whole=False)
    differ = difference(wanted, logits_of(made.module, tokens))
    if not differ <= ALLOWED:
        raise ParityError(
            f"{what}: with it in its weights, {model.name} differs from what peft computes by {differ:.3g} of the "
            f"largest logit, allowed: {ALLOWED:g}. The adapter does more than to add products to weights"
        )
    return made


def _refuse_lost(
    what: str, config: Any, stored: Tree, known: Mapping[str, object], state: Mapping[str, object]
) -> None:
    """Raise ConfigError if a part of an adapter's file is not loaded, or if something is missing there."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA" or getattr(config, "trainable_token_indices", None):
        odd = kind if kind != "LORA" else "LoRA with trainable_token_indices"
        raise ConfigError(f"{what} is of the kind {odd}; only LoRA can be added to weights")
    if missing := sorted(known.keys() - set(stored)):
        raise ConfigError(f"{what} lacks {len(missing)} tensors that its configuration says, such as {missing[0]!r}")
    if extra := sorted(set(stored) - known.keys() - state.keys()):
        raise ConfigError(f"{what} has {len(extra)} tensors that this model has no place for, such as {extra[0]!r}")


def _refuse_other_base(
    model: LanguageModel, folder: Path, revision: str | None, weights: Mapping[str, torch.Tensor]
) -> None:
    """Raise ConfigError if edgefl has written the adapter for other weights; the job may have had them in 16 bits."""
    import torch

    from edgefl.models.adapters.peft_format import base_digest

    if revision is None or not _SHA256.fullmatch(revision):
        return  # by another program, which names no weights
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if base_digest((name, array_of(one.detach().to(dtype))) for name, one in weights.items()) == revision:
            return
    raise ConfigError(
        f"the adapter in {folder} was trained on other weights than those of {model.name}: their SHA-256 is not "
        f"{revision[:16]}.... Name the model that the job's task has loaded"
    )


def _with_tree(model: LanguageModel, tree: Tree, what: str, *, is_whole: bool = True) -> LanguageModel:
    import torch

    module: Any = model.module
    state: dict[str, torch.Tensor] = module.state_dict()
    places = _places(tree, state, model.name, what)
    matrices = [name for name in places if is_low_rank(name)]
    replaced = [name for name in places if not is_low_rank(name)]
    _refuse_tied(state, [places[name] for name in matrices], what)
    if is_whole:
        _refuse_missing(state, [places[name] for name in replaced], model.name, what)
    changes: dict[str, Factors] = {}
    with torch.no_grad(), np.errstate(over="ignore", invalid="ignore"):  # checked below, with the tensor's name
        for name in replaced:
            state[places[name]].copy_(tensor_of(_checked(tree[name], name, what)))
        for name in replaced:
            if not np.array_equal(array_of(state[places[name]]), tree[name].astype(np.float32)):
                raise ConfigError(
                    f"{what}: {name} differs from a tensor that {model.name} has in its place, too: they are tied in "
                    "the model, and were trained apart"
                )
        for name in matrices:
            weight, target = array_of(state[places[name]]), state[places[name]]
            pair = factors_of(tree, name)
            if pair is None:  # of as high a rank as the weight
                target.copy_(tensor_of(weight + _checked(tree[name], name, what)))
            elif pair.rank:
                changes[places[name]] = pair = pair.scaled(1.0, np.dtype(np.float32))
                target.copy_(tensor_of(_checked(added(weight, pair), name, what)))
    for name, one in state.items():
        _checked(array_of(one), name, what)
    return dataclasses.replace(model, changes={**model.changes, **changes})


def _refuse_tied(state: Mapping[str, torch.Tensor], moved: Iterable[str], what: str) -> None:
    """Raise ConfigError if something is added to a weight that the model has at another place, too."""
    for name in moved:
        others = [one for one in state if one != name and state[one].data_ptr() == state[name].data_ptr()]
        if others:
            raise ConfigError(
                f"{what}: adapters were trained on {name}, which is {others[0]} in this model, too. Untie them in the "
                "model's folder, as the task has done"
            )


def _refuse_missing(state: Mapping[str, torch.Tensor], found: Iterable[str], model: str, what: str) -> None:
    """Raise ConfigError if some tensors of the model are not among a job's."""
    here = {state[name].data_ptr() for name in found}
    missing = [name for name, one in state.items() if one.data_ptr() not in here]
    if missing:
        raise ConfigError(
            f"{what} lacks {len(missing)} of the {len(state)} tensors of {model}, such as {missing[0]!r}. Expected all "
            "parameters of a job whose task trains this model, as `edgefl run --out` writes them"
        )


def _places(tree: Tree, state: Mapping[str, torch.Tensor], model: str, what: str) -> dict[str, str]:
    """Return the tensor of the model for each of a job's."""
    own = {name: _own_name(name) for name in tree if _ORIGINAL not in name}
    if factors := [name for name in own if _FACTOR.search(name)]:
        raise ConfigError(
            f"{what} has {factors[0]!r}, a factor that was trained alone, without its scaling (frozen A). Train both "
            "factors, or add the adapters in the task's own code"
        )
    prefix = _prefix(own.values(), state)
    places = {name: one.removeprefix(prefix) for name, one in own.items()}
    for name, place in places.items():
        if place not in state:
            raise ConfigError(
                f"{what} has a tensor {name!r}, which {model} has not: it has tensors such as {next(iter(state))!r}. "
                "Expected the parameters of a job whose task trains this language model"
            )
        if tree[name].shape != tuple(state[place].shape):
            raise ConfigError(
                f"{what}: {name} has shape {list(tree[name].shape)}, expected {list(state[place].shape)} as in {model}"
            )
    return places


def _own_name(name: str) -> str:
    """Return the name that a tensor has without peft's wrappers."""
    own = name.removesuffix(MARK) + ".weight" if is_low_rank(name) else name
    return _SAVED.sub(".", own.replace(".base_layer.", "."))


def _prefix(names: Iterable[str], state: Mapping[str, object]) -> str:
    """Return what stands before the model's own names in most of a job's."""
    fits = Counter(name[: len(name) - len(end)] for name in names for end in _ends(name) if end in state)
    return min(fits, key=lambda prefix: (-fits[prefix], len(prefix)), default="")


def _ends(name: str) -> Iterator[str]:
    """Yield a name without the first of its parts, without the first two, ..; first the whole."""
    parts = name.split(".")
    return (".".join(parts[number:]) for number in range(len(parts)))


def _checked(array: Array, name: str, what: str) -> Array:
    """Return a copy in float32; raises ConfigError for values that are not finite numbers."""
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise ConfigError(f"{what}: {name} has dtype {array.dtype}, expected floating-point numbers")
    copy = array.astype(np.float32)
    if not np.isfinite(copy).all():
        raise ConfigError(f"{what}: {name} has NaN or infinite values; such a model generates nothing")
    return copy
