"""Generation by stages in one process: tokens of the whole model, for every cut and format."""

from __future__ import annotations

import numpy as np
import pytest

from edgefl.errors import ConfigError
from edgefl.offload.generation.blocks import numpy_engine
from edgefl.offload.generation.generate import generate, load_part
from edgefl.offload.generation.sampling import Sampling
from edgefl.offload.generation.stage_info import WEIGHTS_FILE, read_stage, sha256_of, write_stage
from edgefl.protocols.inference.sequences import encode_hidden
from tests.language_models import write_stages

PROMPT = list(b"once upon a time")


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, top_p=0.9, seed=5)])
def test_tokens_of_two_stages_are_those_of_the_whole(tmp_path, sampling) -> None:
    write_stages(tmp_path, None)
    expected = list(generate([load_part(tmp_path / "whole", numpy_engine())], PROMPT, 30, sampling))
    assert len(set(expected)) > 10
    for cut in (0, 1, 3, 4):
        write_stages(tmp_path, cut)
        parts = [load_part(tmp_path / one, numpy_engine()) for one in ("head", "tail")]
        assert list(generate(parts, PROMPT, 30, sampling)) == expected


def test_what_crosses_is_one_row_for_each_token_after_the_prompt(tmp_path) -> None:
    write_stages(tmp_path, 2)
    parts = [load_part(tmp_path / one, numpy_engine()) for one in ("head", "tail")]
    sent = []

    def transport(hidden):
        sent.append(hidden.shape)
        return encode_hidden(hidden, "fp16").astype(np.float32)

    assert len(list(generate(parts, PROMPT, 3, Sampling(), transport))) == 3
    assert sent == [(16, 32), (1, 32), (1, 32)]


def test_weights_that_are_no_tensors_are_refused(tmp_path) -> None:
    write_stages(tmp_path, 2)
    path = tmp_path / "tail" / WEIGHTS_FILE
    info = read_stage(tmp_path / "tail")
    path.write_bytes(b"no tensors at all")
    import dataclasses

    write_stage(tmp_path / "tail", dataclasses.replace(info, digest=sha256_of(path)))
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged"):
        load_part(tmp_path / "tail", numpy_engine())
