"""The blocks of a Llama-like decoder, with a cache of keys and values for each sequence.

Written once over the names that numpy and torch share: a device computes its head with numpy alone, a tail runs on
torch, also on a GPU. Rows of several sequences are computed together without padding: whatever has weights takes all
rows as one matrix, and attention is computed for each sequence on its own cache. So a sequence's result does not
depend on the others but for the order of additions.

Vaswani et al. 2017 (attention), Su et al. 2021 (rotary positions), Shazeer 2020 (gated SiLU), Zhang and Sennrich 2019
(root-mean-square norm), Ainslie et al. 2023 (heads that share keys). Tensors have their names in transformers.
"""

# Shapes: N = rows of all sequences, T = rows of one, L = its tokens so far, E = hidden size, H = heads, K = heads of
# keys and values, G = H / K, D = size of a head, V = vocabulary.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgefl.errors import ConfigError
from edgefl.offload.generation.stage_info import StageInfo
from edgefl.trees import Array, Tree

EMBEDDING, NORM, HEAD, ROTARY = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "rotary.frequencies"
_FIRST_ROOM = 64  # tokens that a cache has room for at first


@dataclass(frozen=True, slots=True)
class ArrayLibrary:
    """The library that computes: numpy or torch, and how its arrays are made."""

    xp: Any
    device: str = ""  # of torch

    def array(self, values: Array) -> Any:
        """Return an array of the library with a copy of the values, unless numpy's can be used as it is."""
        if self.xp is np:
            return values
        return self.xp.tensor(values, device=self.device or None)

    def empty(self, *shape: int) -> Any:
        """Return an uninitialised float32 array."""
        if self.xp is np:
            return np.empty(shape, np.float32)
        return self.xp.empty(shape, dtype=self.xp.float32, device=self.device or None)

    def product(self, values_ne: Any, matrix_oe: Any) -> Any:
        """Return values matrix^T (N, O).

        Of two matrices BLAS copies the second one into its own order, for each product again. numpy gets the weights as
        the first one: for 2 to 64 rows that takes two thirds of the time.
        """
        return (matrix_oe @ values_ne.T).T if self.xp is np else values_ne @ matrix_oe.T

    def attention(self, queries_krd: Any, keys_kld: Any, values_kld: Any, hidden_rl: Array | None) -> Any:
        """Return softmax(queries keys^T / sqrt(D)) values (K, R, D); where `hidden_rl` is True, a row sees nothing."""
        scale = queries_krd.shape[-1] ** -0.5
        if self.xp is not np:
            seen = None if hidden_rl is None else self.array(~hidden_rl)
            attend = self.xp.nn.functional.scaled_dot_product_attention  # one call; by hand they are eight
            return attend(queries_krd[None], keys_kld[None], values_kld[None], seen, scale=scale)[0]
        scores = queries_krd @ keys_kld.swapaxes(1, 2) * np.float32(scale)
        if hidden_rl is not None:
            scores[:, hidden_rl] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return weights @ values_kld / weights.sum(-1, keepdims=True)

    def numpy(self, values: Any) -> Array:
        """Return values as a numpy array."""
        made: Array = values if self.xp is np else values.cpu().numpy()
        return made


def numpy_engine() -> ArrayLibrary:
    """Return the engine of devices."""
    return ArrayLibrary(np)


def torch_engine(device: str = "") -> ArrayLibrary:
    """Return torch as the engine; raises MissingExtra without it."""
    try:
        import torch
    except ImportError as cause:
        from edgefl.errors import MissingExtra

        raise MissingExtra("the tail of a language model", "offload") from cause
    return ArrayLibrary(torch, device)


class SequenceCache:
    """Keys and values of one sequence in the blocks of a stage."""

    def __init__(self, engine: ArrayLibrary, info: StageInfo) -> None:
        self._engine, self._info = engine, info
        self._room = 0
        self._stored: Any = None  # (blocks, 2, K, room, D)
        self.length = 0

    @property
    def num_bytes(self) -> int:
        return self._room * self._info.cache_bytes

    def make_room(self, num_tokens: int) -> None:
        """Have room for so many more tokens; a larger cache is half as large again."""
        needed = self.length + num_tokens
        if needed <= self._room:
            return
        spec, former = self._info.spec, self._stored
        larger = max(self._room * 3 // 2, _FIRST_ROOM) if self.length else 0
        self._room = max(needed, min(larger, spec.context))
        blocks = self._info.end - self._info.start
        self._stored = self._engine.empty(blocks, 2, spec.kv_heads, self._room, spec.head_size)
        if self.length:
            self._stored[:, :, :, : self.length] = former[:, :, :, : self.length]

    def put(self, block: int, rows_t2kd: Any) -> tuple[Any, Any]:
        """Add keys and values (T, 2, K, D) behind those of a block; return all its keys and values (K, L, D)."""
        end = self.length + len(rows_t2kd)
        kept = self._stored[block]
        if len(rows_t2kd) == 1:
            kept[:, :, self.length] = rows_t2kd[0]
        else:
            kept[:, :, self.length : end] = self._engine.xp.moveaxis(rows_t2kd, 0, 2)
        return kept[0, :, :end], kept[1, :, :end]


@dataclass(frozen=True, slots=True)
class Rows:
    """Some next rows of one sequence in a batch."""

    cache: SequenceCache
    num: int


@dataclass(frozen=True, slots=True)
class _BlockWeights:
    """The weights of one block; matrices are (out, in)."""

    first_norm: Any
    to_heads: Any  # queries, keys and values one below the other
    to_heads_bias: Any
    query_norm: Any
    key_norm: Any
    from_heads: Any
    from_heads_bias: Any
    second_norm: Any
    gate_and_up: Any
    gate_and_up_bias: Any
    down: Any
    down_bias: Any


class DecoderPart:
    """One stage in memory. `run` is not for several threads at once."""

    def __init__(self, info: StageInfo, tensors: Tree, engine: ArrayLibrary) -> None:
        self.info, self.engine = info, engine
        taken = _Taken(tensors, engine)
        spec = info.spec
        self._blocks = [_block(taken, f"model.layers.{number}.", info) for number in range(info.start, info.end)]
        self._frequencies = taken.get(ROTARY, (spec.head_size // 2,))
        self._embedding: Any = taken.get(EMBEDDING, (spec.vocabulary, spec.hidden)) if info.is_first else None
        self._norm = taken.get(NORM, (spec.hidden,)) if info.is_last else None
        self._head: Any = None
        if info.is_last:
            shares = self._embedding is not None and HEAD not in tensors
            self._head = self._embedding if shares else taken.get(HEAD, (spec.vocabulary, spec.hidden))
        if unused := sorted(tensors.keys() - taken.names):
            raise ConfigError(f"{info.what} has tensors that this version cannot compute with: {', '.join(unused[:5])}")

    def new_cache(self, room: int = 0) -> SequenceCache:
        """Return an empty cache for one sequence, with room for so many tokens; it grows beyond them."""
        cache = SequenceCache(self.engine, self.info)
        cache.make_room(room)
        return cache

    def embed(self, tokens: Sequence[int]) -> Any:
        """Return the embeddings (N, E) of tokens."""
        return self._embedding[self.engine.array(np.asarray(tokens, np.int64))]

    def run(self, hidden_ne: Any, rows: Sequence[Rows]) -> Any:
        """Return hidden states (N, E) behind the blocks, and add the rows to their sequences' caches."""
        for one in rows:
            one.cache.make_room(one.num)
        spans = np.concatenate([np.arange(one.cache.length, one.cache.length + one.num) for one in rows])
        angles = self.engine.array(spans.astype(np.float32))[:, None] * self._frequencies
        xp, scale = self.engine.xp, self.info.spec.rotary_scale
        turns = (xp.cos(angles) * scale)[:, None], (xp.sin(angles) * scale)[:, None]
        with np.errstate(over="ignore"):  # exp in SiLU: infinity there gives the right 0
            for number, block in enumerate(self._blocks):
                hidden_ne = self._through(number, block, hidden_ne, turns, rows)
        for one in rows:
            one.cache.length += one.num
        return hidden_ne

    def logits(self, hidden_ne: Any) -> Array:
        """Return the logits (N, V) of hidden states behind the last block."""
        return self.engine.numpy(self.engine.product(self._normed(hidden_ne, self._norm), self._head))

    def _through(self, number: int, block: _BlockWeights, hidden_ne: Any, turns: Any, rows: Sequence[Rows]) -> Any:
        """Return hidden states behind one block."""
        spec, xp = self.info.spec, self.engine.xp
        mixed = self._linear(self._normed(hidden_ne, block.first_norm), block.to_heads, block.to_heads_bias)
        mixed = mixed.reshape(len(mixed), -1, spec.head_size)
        queries, keys = mixed[:, : spec.heads], mixed[:, spec.heads : spec.heads + spec.kv_heads]
        values = mixed[:, spec.heads + spec.kv_heads :]
        if block.query_norm is not None:
            queries, keys = self._normed(queries, block.query_norm), self._normed(keys, block.key_norm)
        queries = self._turned(queries, turns)
        stored = xp.concatenate([self._turned(keys, turns), values], 1).reshape(-1, 2, spec.kv_heads, spec.head_size)
        heads, at = self.engine.empty(len(mixed), spec.heads * spec.head_size), 0
        for one in rows:
            span = slice(at, at + one.num)
            heads[span] = self._attended(queries[span], *one.cache.put(number, stored[span]))
            at += one.num
        hidden_ne = hidden_ne + self._linear(heads, block.from_heads, block.from_heads_bias)
        wide = self._linear(self._normed(hidden_ne, block.second_norm), block.gate_and_up, block.gate_and_up_bias)
        gate, up = wide[:, : wide.shape[1] // 2], wide[:, wide.shape[1] // 2 :]
        return hidden_ne + self._linear(gate / (1 + xp.exp(-gate)) * up, block.down, block.down_bias)

    def _linear(self, values: Any, matrix: Any, bias: Any) -> Any:
        made = self.engine.product(values, matrix)
        return made if bias is None else made + bias

    def _normed(self, values: Any, weight: Any) -> Any:
        xp = self.engine.xp
        mean = xp.mean(values * values, axis=-1, keepdims=True)
        return values / xp.sqrt(mean + self.info.spec.norm_epsilon) * weight

    def _turned(self, values_nhd: Any, turns: tuple[Any, Any]) -> Any:
        """Return queries or keys, rotated by their positions."""
        cosine, sine = turns
        half = self.info.spec.head_size // 2
        first, second = values_nhd[:, :, :half], values_nhd[:, :, half:]
        return self.engine.xp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)

    def _attended(self, queries_thd: Any, keys_kld: Any, values_kld: Any) -> Any:
        """Return the attention (T, H D) of one sequence's rows to its tokens so far."""
        spec, xp = self.info.spec, self.engine.xp
        num, length, kv_heads = len(queries_thd), keys_kld.shape[1], spec.kv_heads
        group = spec.heads // kv_heads
        if num == 1:  # once for each sequence and block of a step
            grouped = queries_thd.reshape(kv_heads, group, spec.head_size)
            return self.engine.attention(grouped, keys_kld, values_kld, None).reshape(1, -1)
        grouped = xp.swapaxes(queries_thd.reshape(num, kv_heads, group, spec.head_size), 0, 1)
        # A row does not see those behind it.
        hidden = np.triu(np.ones((num, length), bool), length - num + 1).repeat(group, axis=0)
        mixed = self.engine.attention(
            grouped.reshape(kv_heads, num * group, spec.head_size), keys_kld, values_kld, hidden
        )  # fmt: skip
        return xp.swapaxes(mixed.reshape(kv_heads, num, group, spec.head_size), 0, 1).reshape(num, -1)


class _Taken:
    """Takes tensors by their names, and remembers which."""

    def __init__(self, tensors: Tree, engine: ArrayLibrary) -> None:
        self._tensors, self._engine = tensors, engine
        self.names: set[str] = set()

    def get(self, name: str, shape: tuple[int, ...] | None = None) -> Any:
        """Return one tensor; raises ConfigError if it is missing or of another shape."""
        made = self.optional(name)
        if made is None or (shape is not None and tuple(made.shape) != shape):
            seen = "missing" if made is None else f"of shape {list(made.shape)}"
            raise ConfigError(f"tensor {name} is {seen}; expected shape {list(shape or ())}. Split the model again")
        return made

    def optional(self, name: str) -> Any:
        return None if name not in self._tensors else self._engine.array(self._read(name))

    def joined(self, names: Sequence[str]) -> Any:
        """Return several tensors, one below the other; None if there is none of them."""
        found = [self._read(name) for name in names if name in self._tensors]
        if len(found) not in {0, len(names)}:
            raise ConfigError(f"only {len(found)} of the tensors {', '.join(names)} are there; split the model again")
        return self._engine.array(np.concatenate(found)) if found else None

    def _read(self, name: str) -> Array:
        self.names.add(name)
        return np.ascontiguousarray(self._tensors[name], np.float32)


def _block(taken: _Taken, prefix: str, info: StageInfo) -> _BlockWeights:
    spec = info.spec
    attention, dense = f"{prefix}self_attn.", f"{prefix}mlp."
    heads = [f"{attention}{one}_proj" for one in "qkv"]
    wide = [f"{dense}{one}_proj" for one in ("gate", "up")]
    to_heads, gate_and_up = _matrices(taken, heads), _matrices(taken, wide)
    rows = (spec.heads + 2 * spec.kv_heads) * spec.head_size
    if tuple(to_heads.shape) != (rows, spec.hidden):
        raise ConfigError(f"{prefix}self_attn has shape {list(to_heads.shape)}; expected {[rows, spec.hidden]}")
    return _BlockWeights(
        first_norm=taken.get(f"{prefix}input_layernorm.weight", (spec.hidden,)),
        to_heads=to_heads,
        to_heads_bias=taken.joined([f"{one}.bias" for one in heads]),
        query_norm=taken.optional(f"{attention}q_norm.weight"),
        key_norm=taken.optional(f"{attention}k_norm.weight"),
        from_heads=taken.get(f"{attention}o_proj.weight", (spec.hidden, spec.heads * spec.head_size)),
        from_heads_bias=taken.optional(f"{attention}o_proj.bias"),
        second_norm=taken.get(f"{prefix}post_attention_layernorm.weight", (spec.hidden,)),
        gate_and_up=gate_and_up,
        gate_and_up_bias=taken.joined([f"{one}.bias" for one in wide]),
        down=taken.get(f"{dense}down_proj.weight", (spec.hidden, gate_and_up.shape[0] // 2)),
        down_bias=taken.optional(f"{dense}down_proj.bias"),
    )


def _matrices(taken: _Taken, names: Sequence[str]) -> Any:
    made = taken.joined([f"{one}.weight" for one in names])
    if made is None:
        raise ConfigError(f"the tensors {', '.join(names)} are missing; split the model again")
    return made


def tensors_of(state: Mapping[str, Any], start: int, end: int, *, first: bool, last: bool) -> list[str]:
    """Return which names of a whole model's state are in the stage of blocks `start` to `end`."""
    prefixes = [f"model.layers.{number}." for number in range(start, end)]
    ends = ({EMBEDDING} if first else set()) | ({NORM, HEAD} if last else set())
    return [name for name in state if name in ends or name.startswith(tuple(prefixes))]
