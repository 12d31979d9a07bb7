"""What a stage of a language model is: `stage.json` in its folder.

    FOLDER/stage.json          this record
    FOLDER/model.safetensors   its tensors, by their names in the whole model (of Hugging Face transformers)
    FOLDER/tokenizer.json      of the first stage: the format of Hugging Face tokenizers
    FOLDER/changes.safetensors for the publisher alone: the adapters that are in the tensors, as factors

A stage needs no code of others to run: the record says what its blocks compute (`DecoderSpec`).
Invariant: `read_stage` returns a record whose files have the digests in it, or raises.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgefl.errors import BlobDamaged, ConfigError

STAGE_FILE, WEIGHTS_FILE, TOKENIZER_FILE = "stage.json", "model.safetensors", "tokenizer.json"
CHANGES_FILE = "changes.safetensors"
FORMAT = 1
CUT_FORMATS = ("fp32", "fp16", "bf16")  # of what crosses the cut of a language model
_MAX_SIZE = 1 << 24  # of one dimension


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderSpec:
    """The sizes of a decoder of the Llama family: root-mean-square norms, rotary positions, gated SiLU."""

    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    context: int  # the most tokens of a sequence
    num_blocks: int  # of the whole model
    norm_epsilon: float
    rotary_scale: float = 1.0  # of cosine and sine

    def __post_init__(self) -> None:
        sizes = (self.hidden, self.heads, self.kv_heads, self.head_size, self.vocabulary, self.context)
        if not all(type(one) is int and 0 < one <= _MAX_SIZE for one in (*sizes, self.num_blocks)):
            raise ConfigError(f"a decoder's sizes must be whole numbers from 1 to {_MAX_SIZE}, seen: {self}")
        if self.heads % self.kv_heads or self.head_size % 2:
            raise ConfigError(
                f"{self.heads} heads must be a multiple of {self.kv_heads} heads of keys, and the head's size "
                f"{self.head_size} even"
            )
        if not (0 < self.norm_epsilon < 1 and math.isfinite(self.rotary_scale)):
            raise ConfigError(f"norm_epsilon {self.norm_epsilon} must be in 0..1, rotary_scale finite")

    def cache_bytes(self, num_blocks: int) -> int:
        """Return the bytes of keys and values of one token in so many blocks, in float32."""
        return num_blocks * 2 * self.kv_heads * self.head_size * 4


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFacts:
    """What the first stage needs besides its tokenizer to turn conversations into tokens, and tokens into text."""

    chat_template: str = ""  # Jinja; empty = the model is not for conversations
    bos_token: str = ""
    eos_token: str = ""
    end_tokens: tuple[int, ...] = ()  # a generated one ends the text


@dataclass(frozen=True, kw_only=True, slots=True)
class StageInfo:
    """One stage: blocks `start` to `end` (exclusive); the embedding is in the first, norm and head in the last."""

    name: str
    spec: DecoderSpec
    start: int
    end: int
    digest: str  # SHA-256 of its model.safetensors, in hex
    weight_bytes: int
    tail_digest: str = ""  # of the stage behind it, which continues what this one begins; empty = this is the last
    tokenizer_digest: str = ""  # of the first stage
    text: TextFacts = dataclasses.field(default_factory=TextFacts)
    format: int = FORMAT

    @property
    def is_first(self) -> bool:
        return bool(self.tokenizer_digest)

    @property
    def is_last(self) -> bool:
        return self.end == self.spec.num_blocks and not self.tail_digest

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values of one token in this stage."""
        return self.spec.cache_bytes(self.end - self.start)

    @property
    def what(self) -> str:
        """The stage in words, for messages."""
        if self.is_first and self.is_last:
            return f"the whole model {self.name}"
        part = "head" if self.is_first else "tail"
        return f"the {part} of {self.name} (blocks {self.start} to {self.end} of {self.spec.num_blocks})"


def check_first(info: StageInfo, tail: str, option: str) -> None:
    """Raise ConfigError unless a stage can generate with a tail (HOST:PORT), or without; `option` gives the tail."""
    if not info.is_first:
        raise ConfigError(f"the folder has {info.what}; a device takes the folder `head`, or `whole`")
    if info.is_last and tail:
        raise ConfigError(f"the folder has {info.what}, which needs no tail: leave out {option}")
    if not info.is_last and not tail:
        raise ConfigError(
            f"the folder has {info.what}: its tail is needed, {option} HOST:PORT of `edgefl cloud generate`"
        )


def write_stage(folder: Path, info: StageInfo) -> None:
    """Write the record; the other files are there."""
    text = json.dumps(dataclasses.asdict(info), indent=2, ensure_ascii=False)
    (folder / STAGE_FILE).write_text(text + "\n", encoding="utf-8")


def read_stage(folder: Path) -> StageInfo:
    """Return the record of a stage's folder, after its files' digests were compared.

    Raises ConfigError for a folder that is no stage, BlobDamaged for a file that is not the one of the record.
    """
    path = folder / STAGE_FILE
    try:
        info = _parse(json.loads(path.read_text(encoding="utf-8")))
    except OSError as cause:
        raise ConfigError(
            f"{folder} is not a stage of a language model: {STAGE_FILE} cannot be read ({cause.strerror}). "
            "`edgefl offload split-decoder` writes such folders"
        ) from cause
    except (ValueError, TypeError, KeyError) as cause:
        raise ConfigError(f"{path} is damaged, or of another version: {cause}") from cause
    _check_file(folder / WEIGHTS_FILE, info.digest)
    if info.is_first:
        _check_file(folder / TOKENIZER_FILE, info.tokenizer_digest)
    return info


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, hashlib.sha256).hexdigest()


def _parse(value: dict[str, Any]) -> StageInfo:
    if value.get("format") != FORMAT:
        raise ConfigError(f"format {value.get('format')!r}, this version reads {FORMAT}")
    text = dict(value["text"])
    text["end_tokens"] = tuple(int(one) for one in text["end_tokens"])
    info = StageInfo(**{**value, "spec": DecoderSpec(**value["spec"]), "text": TextFacts(**text)})
    if not 0 <= info.start <= info.end <= info.spec.num_blocks:
        raise ConfigError(f"blocks {info.start} to {info.end} of {info.spec.num_blocks}")
    return info


def _check_file(path: Path, wanted: str) -> None:
    try:
        seen = sha256_of(path)
    except OSError as cause:
        raise ConfigError(f"{path} cannot be read: {cause.strerror}. Split the model again") from cause
    if seen != wanted:
        raise BlobDamaged(
            f"{path} has SHA-256 {seen}, its {STAGE_FILE} says {wanted}. Copy the folder again, or split the model "
            "again"
        )
