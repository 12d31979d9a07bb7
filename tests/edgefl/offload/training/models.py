"""Small models of three kinds for training in parts, with data of a fixed seed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edgefl import Task

NUM = 64


class SmallConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1, stride=2)
        self.norm, self.head = nn.GroupNorm(2, 8), nn.Linear(8 * 16, 10)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(pictures))
        hidden = self.norm(self.second(hidden)) + hidden.mean((1, 2, 3), keepdim=True)  # read over the cut of `second`
        return self.head(torch.flatten(torch.relu_(hidden), 1))


class NormedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4 * 36, 10)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.head(torch.flatten(torch.relu(self.norm(self.first(pictures))), 1))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = ViTForImageClassification(
                ViTConfig(
                    hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=8,
                    patch_size=4, num_channels=1, num_labels=10, hidden_dropout_prob=0.0,
                    attention_probs_dropout_prob=0.0,
                )
            )  # fmt: skip

        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.vit(pictures).logits
            return logits

    return Net()


def decoder(*, tied: bool = True, layers: int = 3) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=37, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied, max_position_embeddings=32,
        )
    )  # fmt: skip


def adamw(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr)


def momentum(parameters: Any, lr: float) -> torch.optim.Optimizer:
    """Not Adam for attention: a key's bias has the gradient 0, whose rounding Adam divides by itself."""
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def pictures(**_: str) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(7)
    return torch.randn(NUM, 1, 8, 8, generator=draw), torch.randint(0, 10, (NUM,), generator=draw)


def tokens(**_: str) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(7)
    text = torch.randint(0, 37, (NUM, 13), generator=draw)
    return text[:, :-1], text[:, 1:]


def next_token_loss(outputs: Any, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs.logits.flatten(0, 1), targets.flatten())


def picture_task(model: Any = SmallConvNet, **more: Any) -> Task:
    return Task(name="pictures", model=model, loss=nn.functional.cross_entropy, train_data=pictures, **more)


def token_task(model: Any = decoder, **more: Any) -> Task:
    return Task(name="tokens", model=model, loss=next_token_loss, train_data=tokens, **more)
