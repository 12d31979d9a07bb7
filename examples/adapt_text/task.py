"""SmolLM2-135M-Instruct learns from texts that stay on the devices: LoRA adapters, trained in parts.

The operator's machine has the model's file (examples/chat/get_model.py); devices get their layers with the job. A
device's texts are a file, one text a line; without it, docstrings of Python's standard library, which every machine
has: a module's name decides to which part it belongs, and a tenth of the modules is held out.

    edgefl agent start --data tokenizer=smollm2/head/tokenizer.json --data texts=/srv/texts.txt
"""

import ast
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from edgefl import Task
from edgefl.offload.training.bare import structure_only

MODEL = Path(os.environ.get("SMOLLM2", "model/SmolLM2-135M-Instruct.Q4_1.gguf"))
TOKENIZER = "smollm2/head/tokenizer.json"
LENGTH, END = 64, 0  # tokens of a sample; the token between two texts
MAX_MODULES, HELD_OUT_OF = 60, 10
SIZES = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=8192, rope_theta=100_000.0,
    rms_norm_eps=1e-5,
)  # fmt: skip


def make_model(rank: int = 8) -> nn.Module:
    """Return the model with adapters on its attention; only its structure where the weights come with the job."""
    if structure_only():
        base = LlamaForCausalLM(SIZES)
    else:
        base = LlamaForCausalLM.from_pretrained(MODEL.parent, gguf_file=MODEL.name, dtype=torch.float32)
    return get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"]))


def load_texts(
    part: str = "0", parts: str = "1", num: str = "64", texts: str = "", tokenizer: str = TOKENIZER
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return at most `num` samples: tokens and those that follow them, each (N, LENGTH)."""
    if texts:
        lines: Iterable[str] = Path(texts).read_text("utf-8").splitlines()
    else:
        lines = _docstrings(lambda place: place % HELD_OUT_OF and place % int(parts) == int(part))
    return _samples(lines, tokenizer, int(num))


def held_out() -> tuple[torch.Tensor, torch.Tensor]:
    """Return samples of modules that no device has."""
    return _samples(_docstrings(lambda place: not place % HELD_OUT_OF), TOKENIZER, 16)


def _docstrings(is_wanted: Any) -> Iterator[str]:
    """Yield the docstrings of modules whose place is wanted; a place is a number that the name gives."""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:MAX_MODULES]:
        if is_wanted(zlib.crc32(file.name.encode()) >> 3):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                    yield text


def _samples(lines: Iterable[str], tokenizer: str, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    codec, tokens = Tokenizer.from_file(tokenizer), list[int]()
    for line in lines:
        tokens += [*codec.encode(line).ids, END]
        if len(tokens) > num * LENGTH:
            break
    count = min(num, (len(tokens) - 1) // LENGTH)
    if not count:
        message = f"the texts have {len(tokens)} tokens; a sample has {LENGTH + 1}"
        raise ValueError(message)
    row = torch.tensor(tokens[: count * LENGTH + 1])
    return row[:-1].reshape(count, LENGTH), row[1:].reshape(count, LENGTH)


def next_token(outputs: Any, wanted: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy over all tokens of a batch, in nats."""
    return nn.functional.cross_entropy(outputs.logits.flatten(0, 1), wanted.flatten())


def adamw(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr)


task = Task(
    name="adapt-text",
    model=make_model,
    loss=next_token,
    train_data=load_texts,
    test_data=held_out,
    optimizer=adamw,
)
