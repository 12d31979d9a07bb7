"""SmolLM2 on a device with 512 MB: the whole is refused in words, split it generates the whole's 64 tokens."""

from __future__ import annotations

import pytest

from benchmarks import generation
from benchmarks.generation_model import PROMPT, stage_folders
from edge_agent.generation.text import TextCodec
from edgefl.offload.generation.blocks import numpy_engine
from edgefl.offload.generation.generate import generate, load_part
from edgefl.offload.generation.sampling import Sampling
from edgefl.offload.generation.stage_info import CUT_FORMATS, read_stage
from tests.language_models import smollm2


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_whole_is_refused_and_split_generates_in_each_format_also_when_the_tail_is_killed() -> None:
    folder = smollm2(stage_folders)
    codec = TextCodec(folder / "head", read_stage(folder / "head"))
    prompt = codec.encode_chat([{"role": "user", "content": PROMPT}])
    whole = list(generate([load_part(folder / "whole", numpy_engine())], prompt, 64, Sampling()))
    assert not codec.end_tokens & set(whole)
    rows = list(generation._small_device(folder, prompt, whole, CUT_FORMATS))
    refused, *texts, killed = rows
    assert "Split it so that at most 19 of its 30 blocks are here" in refused.detail["words"]
    assert [row.ours for row in (*texts, killed)] == [64.0] * 4
    assert all(row.met for row in rows)
    assert max(row.detail["peak_mb"] for row in texts) < generation.DEVICE_MB
