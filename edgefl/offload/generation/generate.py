"""Stages from their folders, and generation by several of them in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from edgefl.errors import ConfigError, ProtocolError
from edgefl.offload.generation.blocks import ArrayLibrary, DecoderPart, Rows
from edgefl.offload.generation.sampling import Sampling, choose
from edgefl.offload.generation.stage_info import WEIGHTS_FILE, read_stage
from edgefl.trees import Array, SpooledTree

PREFILL_ROWS = 256  # tokens of a prompt that are computed together

Transport = Callable[[Array], Array]  # hidden states at a cut -> as they arrive


def load_part(folder: Path, engine: ArrayLibrary) -> DecoderPart:
    """Return the stage of a folder; raises ConfigError or BlobDamaged for one that cannot be used."""
    return DecoderPart(read_stage(folder), weights_of(folder), engine)


def weights_of(folder: Path) -> SpooledTree:
    """Return the tensors of a stage, which are read when they are needed; raises ConfigError for a damaged file."""
    try:
        return SpooledTree(folder / WEIGHTS_FILE)
    except ProtocolError as cause:
        raise ConfigError(f"{folder / WEIGHTS_FILE} is damaged: {cause}. Split the model again") from cause


def generate(
    parts: Sequence[DecoderPart], prompt: Sequence[int], num: int, sampling: Sampling,
    transport: Transport = lambda hidden: hidden,
) -> Iterator[int]:  # fmt: skip
    """Yield `num` tokens behind a prompt, computed by all stages in this process; `transport` is the link at a cut."""
    caches = [part.new_cache() for part in parts]
    given = list(prompt)
    for _ in range(num):
        for at in range(0, len(given), PREFILL_ROWS):
            some = given[at : at + PREFILL_ROWS]
            hidden = parts[0].embed(some)
            for number, (part, cache) in enumerate(zip(parts, caches, strict=True)):
                if number:
                    hidden = part.engine.array(transport(parts[number - 1].engine.numpy(hidden)))
                hidden = part.run(hidden, [Rows(cache, len(some))])
        given = [choose(parts[-1].logits(hidden[-1:])[0], sampling, caches[-1].length)]
        yield given[0]
