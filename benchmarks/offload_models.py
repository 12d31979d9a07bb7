"""Three small models for splitting, in plain torch: a CNN like AlexNet, a MobileNet, a vision transformer.

Their weights are random with a fixed seed: times, sizes and parity do not depend on what was learned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def alexnet(side: int = 96) -> torch.nn.Module:
    """Five convolutions with pooling, then three wide dense layers that have most of the weights."""
    from torch import nn

    def block(before: int, after: int, kernel: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(before, after, kernel, stride, padding=kernel // 2), nn.ReLU()]

    left = (side + 1) // 2 // 2 // 2 // 2
    return nn.Sequential(
        *block(3, 32, 7, 2), nn.MaxPool2d(2),
        *block(32, 64, 5), nn.MaxPool2d(2),
        *block(64, 96, 3), *block(96, 96, 3), *block(96, 64, 3), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(64 * left * left, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10),
    )  # fmt: skip


def whole_alexnet() -> torch.nn.Module:
    """The network of Krizhevsky 2014 (arXiv 1404.5997), for pictures of 224x224: 61 million weights, 94% in layers that
    take 256 maps of 6x6, which are small on a link."""
    from torch import nn

    def block(before: int, after: int, kernel: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(before, after, kernel, stride, padding=2 if kernel > 3 else 1), nn.ReLU()]

    return nn.Sequential(
        *block(3, 64, 11, 4), nn.MaxPool2d(3, 2),
        *block(64, 192, 5), nn.MaxPool2d(3, 2),
        *block(192, 384, 3), *block(384, 256, 3), *block(256, 256, 3), nn.MaxPool2d(3, 2), nn.Flatten(),
        nn.Linear(256 * 36, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000),
    )  # fmt: skip


def mobilenet(width: int = 16, blocks: int = 4) -> torch.nn.Module:
    """Inverted residuals with depthwise convolutions (Sandler et al. 2018)."""
    from torch import nn

    class Inverted(nn.Module):
        def __init__(self, before: int, after: int, stride: int) -> None:
            super().__init__()
            wide = 4 * before
            self.adds = stride == 1 and before == after
            self.layers = nn.Sequential(
                nn.Conv2d(before, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
                nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
                nn.Conv2d(wide, after, 1, bias=False), nn.BatchNorm2d(after),
            )  # fmt: skip

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = self.layers(images)
            return images + made if self.adds else made

    widths = [width * (1 + at // 2) for at in range(blocks + 1)]
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6(),
        *(Inverted(before, after, 1 if before == after else 2) for before, after in pairwise(widths)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10),
    )  # fmt: skip


def vit(side: int = 32, patch: int = 8, width: int = 64, blocks: int = 4) -> torch.nn.Module:
    """A vision transformer (Dosovitskiy et al. 2021) with pre-norm blocks and a class token."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            split = self.qkv(self.first(tokens)).unflatten(-1, (3, 4, width // 4)).permute(2, 0, 3, 1, 4)
            seen = nn.functional.scaled_dot_product_attention(split[0], split[1], split[2])
            tokens = tokens + self.out(seen.transpose(1, 2).flatten(2))
            made: torch.Tensor = tokens + self.mlp(self.second(tokens))
            return made

    class Vit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, width, patch, patch)
            self.token = nn.Parameter(torch.randn(1, 1, width))
            self.places = nn.Parameter(torch.randn(1, (side // patch) ** 2 + 1, width) / 10)
            self.blocks = nn.Sequential(*(Block() for _ in range(blocks)))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            patches = self.patches(images).flatten(2).transpose(1, 2)
            tokens = torch.cat([self.token.expand(patches.shape[0], -1, -1), patches], 1) + self.places
            made: torch.Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
            return made

    return Vit()


MODELS: Mapping[str, Callable[[], torch.nn.Module]] = {"alexnet": alexnet, "mobilenet": mobilenet, "vit": vit}
LARGE = "alexnet-224"  # not in quick runs: measuring all its cuts takes a minute
SIDES: Mapping[str, int] = {"alexnet": 96, "mobilenet": 96, "vit": 32, LARGE: 224}  # of their pictures


def make_model(name: str, seed: int = 0) -> torch.nn.Module:
    """Return one of the models, in evaluation mode, with statistics of batch norm that are not the trivial ones."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (MODELS | {LARGE: whole_alexnet})[name]()
        for one in model.modules():
            if isinstance(one, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(one.weight, 0.5, 1.5)
                torch.nn.init.normal_(one.bias)
    return model.eval()


def pictures(name: str, num: int, seed: int = 0) -> torch.Tensor:
    """Return (num, 3, side, side) inputs for a model: smooth, so that they resemble pictures more than noise does."""
    import torch

    side = SIDES[name]
    coarse = torch.randn(num, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")


def export(name: str, path: Path) -> None:
    """Write a model as ONNX with a free batch dimension; the file is compared with the model."""
    from edgefl.models.export import export_onnx

    export_onnx(make_model(name), pictures(name, 4), path)
