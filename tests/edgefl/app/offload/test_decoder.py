"""`edgefl offload split-decoder` on a small model of transformers."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from edgefl.app.cli import cli
from edgefl.offload.generation.stage_info import read_stage
from tests.language_models import CHAT, byte_tokenizer


def test_head_and_tail_are_written_and_named(tmp_path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the [offload] extra")
    from tokenizers import Tokenizer

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(byte_tokenizer()))
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    out = tmp_path / "out"
    command = ["offload", "split-decoder", str(folder), "--cut", "1", "--name", "small", "--out", str(out), "--json"]
    done = CliRunner().invoke(cli, [*command, str(tmp_path / "r.json")])
    assert done.exit_code == 0, done.output
    assert "the stages compute what the whole model does" in done.output
    assert f"edgefl cloud generate {out / 'tail'}" in done.output.replace("\n", "")
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["model"] == "small"
    assert [one["end"] for one in result["stages"]] == [1, 2]
    assert read_stage(out / "head").tail_digest == read_stage(out / "tail").digest
    wrong = CliRunner().invoke(cli, ["offload", "split-decoder", str(folder), "--cut", "9", "--out", str(out)])
    assert wrong.exit_code != 0
