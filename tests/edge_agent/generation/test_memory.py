"""Whether a stage fits: sums by hand, whose limit counts, and what the refusal says."""

from __future__ import annotations

import dataclasses
import resource

import pytest

from edge_agent.generation.memory import CACHED_TOKENS, PROGRAM_BYTES, check_memory
from edgefl.errors import ConfigError
from edgefl.offload.generation.stage_info import DecoderSpec, StageInfo

MB = 1 << 20
SPEC = DecoderSpec(
    hidden=576, heads=9, kv_heads=3, head_size=64, vocabulary=49152, context=8192, num_blocks=30, norm_epsilon=1e-5
)
WHOLE = StageInfo(
    name="smol", spec=SPEC, start=0, end=30, digest="d", weight_bytes=538_060_160, tokenizer_digest="t"
)  # fmt: skip
HEAD = dataclasses.replace(WHOLE, end=6, weight_bytes=198_208_640, tail_digest="x")


def test_a_whole_model_is_refused_in_words_and_its_head_is_not() -> None:
    with pytest.raises(ConfigError) as refused:
        check_memory(WHOLE, 512)
    words = str(refused.value)
    assert "the whole model smol needs about 668 MB of memory here (weights 513 MB, keys and values of 1024" in words
    assert "there are 512 MB (--generate-memory-mb)" in words
    assert "at most 19 of its 30 blocks are here" in words  # (402 - 108) / (13.5 + 1.5)
    assert "`edgefl offload split-decoder MODEL --cut 19 --out DIR`" in words
    check_memory(HEAD, 512)


def test_what_just_fits_fits() -> None:
    needed = HEAD.weight_bytes + CACHED_TOKENS * SPEC.cache_bytes(6) + PROGRAM_BYTES
    limit_mb = -(-needed // MB)
    check_memory(HEAD, limit_mb)
    with pytest.raises(ConfigError, match="needs about"):
        check_memory(HEAD, limit_mb - 1)


def test_an_embedding_that_is_too_large_is_told() -> None:
    with pytest.raises(ConfigError, match="Its embedding alone has 108 MB: use a smaller model"):
        check_memory(HEAD, 150)


def test_the_system_s_limit_counts_too(monkeypatch) -> None:
    def limited(number):
        return (300 * MB, -1) if number == resource.RLIMIT_DATA else (resource.RLIM_INFINITY,) * 2

    monkeypatch.setattr(resource, "getrlimit", limited)
    with pytest.raises(ConfigError, match=r"there are 300 MB \(RLIMIT_DATA\)"):
        check_memory(HEAD, 0)
    with pytest.raises(ConfigError, match=r"there are 200 MB \(--generate-memory-mb\)"):
        check_memory(HEAD, 200)
