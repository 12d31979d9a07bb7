"""Language models that transformers loads: what is taken of them, and what is refused."""

from __future__ import annotations

import pytest
import torch

from edgefl.errors import ConfigError
from edgefl.offload.generation.language_model import open_language_model
from edgefl.offload.generation.splitting import split_language_model
from edgefl.offload.generation.stage_info import read_stage
from tests.language_models import CHAT, byte_tokenizer

transformers = pytest.importorskip("transformers", reason="needs the [offload] extra")


def test_a_folder_of_transformers_is_read_with_its_tokenizer(tmp_path) -> None:
    from tokenizers import Tokenizer

    folder = tmp_path / "Small-Model"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    codec = Tokenizer.from_str(byte_tokenizer())
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=codec, eos_token="<end>")  # noqa: S106
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    model = open_language_model(folder)
    assert (model.name, model.text.eos_token, model.text.chat_template) == ("small-model", "<end>", CHAT)
    assert model.changes == {}
    assert open_language_model(folder, "Other Name").name == "other-name"
    split_language_model(model, 2, tmp_path)
    assert read_stage(tmp_path / "head").text.end_tokens == (2,)  # of its generation configuration


def test_paths_that_are_no_language_model_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="is no language model: expected a folder"):
        open_language_model(tmp_path / "none")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF....")
    with pytest.raises(ConfigError, match="cannot be loaded by transformers"):
        open_language_model(tmp_path / "bad.gguf")
