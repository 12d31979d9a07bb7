"""A decoder that learns to continue patterns of letters, trained in parts in the U-shape.

The device has the embedding with the first block, and the norm with the head, which share a weight; the blocks between
are in the cloud. So the text's tokens, and what the model makes of them, stay on the device. A language model of
gigabytes is configured in the same way: the structure is made without weights, and a device loads its part alone.
"""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from edgefl import Task

WORDS = 26
LENGTH = 24


def make_model() -> LlamaForCausalLM:
    """Return a decoder of four blocks with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=LENGTH, tie_word_embeddings=True,
        )
    )  # fmt: skip


def load_text(part: str = "0", num: str = "128") -> tuple[torch.Tensor, torch.Tensor]:
    """Return letters and those that follow them, each (N, T): each text steps through the alphabet at its own pace."""
    draw = torch.Generator().manual_seed(1 + int(part))
    starts = torch.randint(0, WORDS, (int(num), 1), generator=draw)
    paces = torch.randint(1, 4, (int(num), 1), generator=draw)
    letters = (starts + paces * torch.arange(LENGTH + 1)) % WORDS
    return letters[:, :-1], letters[:, 1:]


def held_out() -> tuple[torch.Tensor, torch.Tensor]:
    """Return texts of no device."""
    return load_text(part="999", num="64")


def loss(outputs: Any, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean over all letters."""
    return torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), targets.flatten())


def right(outputs: Any, targets: torch.Tensor) -> float:
    """Return the fraction of letters that are continued rightly."""
    return (outputs.logits.argmax(-1) == targets).float().mean().item()


def adamw(parameters: Any, lr: float) -> torch.optim.Optimizer:
    """Return the optimizer of each side's part."""
    return torch.optim.AdamW(parameters, lr=lr)


task = Task(
    name="split-text",
    model=make_model,
    loss=loss,
    train_data=load_text,
    test_data=held_out,
    metrics={"right": right},
    optimizer=adamw,
)
