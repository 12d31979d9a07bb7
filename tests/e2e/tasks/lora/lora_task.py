"""A small task whose model has LoRA adapters of peft on two of its three layers, and a trained head."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import edgefl

WIDTH = 24


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.up(inputs))
        outputs: torch.Tensor = self.head(hidden + torch.tanh(self.down(hidden)))
        return outputs


def with_adapters(base: nn.Module, rank: int = 2, **changes: object) -> nn.Module:
    """Return the base with adapters; scaling is 2 / sqrt(rank), which no float has exactly for most ranks."""
    said = {"target_modules": ["up", "down"], "modules_to_save": ["head"], "use_rslora": True, "lora_alpha": 2}
    model: nn.Module = get_peft_model(base, LoraConfig(r=rank, **(said | changes)))  # type: ignore[arg-type]
    return model


def model(rank: int = 2) -> nn.Module:
    torch.manual_seed(7)  # the base is always the same
    return with_adapters(Base(), rank)


def train_data(part: str = "0", parts: str = "1") -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(100 + int(part))
    inputs = torch.randn(24 + 8 * int(part), 8, generator=drawn)
    return inputs, (inputs[:, 0] > inputs[:, 1]).long() + (inputs[:, 2] > 1).long()


def held_out(part: str = "0", parts: str = "1") -> tuple[torch.Tensor, torch.Tensor]:
    return train_data("50")


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs.argmax(1) == targets).float().mean()


task = edgefl.Task(
    name="lora", model=model, loss=nn.functional.cross_entropy, train_data=train_data, test_data=held_out,
    eval_data=held_out, metrics={"accuracy": accuracy},
)  # fmt: skip
