"""What `benchmarks.split_training` trains: a CNN, a ViT, small decoders, SmolLM2, a large decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.generation_model import model_file
from edgefl import Task
from edgefl.config import TrainConfig
from edgefl.offload.training.bare import structure_only, without_weights
from edgefl.offload.training.layout import layout_of
from edgefl.task import load_task
from edgefl.training.samples import train_samples
from edgefl.trees import Array, SpooledTree, Tree, write_tree

ROOT = Path(__file__).parents[1]
LENGTH = 32  # tokens of a text


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitWorkload:
    """A task, where it is cut, and what its device may use."""

    key: str
    name: str
    task: Callable[[], Task]
    cut: str
    last_cut: str = ""
    batch_size: int = 8
    lr: float = 0.05
    limit_mb: int = 0  # of the device's data
    tensors: Callable[[Path], Tree] | None = None  # the first tensors; None = the model's own

    def layout(self, config: TrainConfig) -> str:
        """Return the layout of a micro-batch."""
        samples = train_samples(self.task(), {})
        return layout_of(samples.first(-(-min(self.batch_size, len(samples)) // config.split.micro_batches)).inputs)


class BenchNet(nn.Module):
    """A CNN of four layers for pictures of 16x16."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.third, self.head = nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.Linear(64 * 16, 10)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return scores (N, 10)."""
        hidden = torch.relu(self.third(torch.relu(self.second(torch.relu(self.first(pictures))))))
        scores: torch.Tensor = self.head(torch.flatten(hidden, 1))
        return scores


class BenchViT(nn.Module):
    """A ViT of four layers and width 48."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=96,
            image_size=16,
            patch_size=4,
            num_labels=10,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.vit = ViTForImageClassification(config)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return scores (N, 10)."""
        scores: torch.Tensor = self.vit(pictures).logits
        return scores


def _pictures(**_: str) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    return torch.randn(160, 3, 16, 16, generator=draw), torch.randint(0, 10, (160,), generator=draw)


def _picture_task(model: Callable[[], nn.Module]) -> Task:
    return Task(name="pictures", model=model, loss=nn.functional.cross_entropy, train_data=_pictures)


def _next_token_loss(outputs: Any, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs.logits.flatten(0, 1), targets.flatten())


def _token_task(model: Callable[[], nn.Module], vocabulary: int, num: int = 64) -> Task:
    def texts(**_: str) -> tuple[torch.Tensor, torch.Tensor]:
        found = torch.randint(0, vocabulary, (num, LENGTH + 1), generator=torch.Generator().manual_seed(5))
        return found[:, :-1], found[:, 1:]

    return Task(name="tokens", model=model, loss=_next_token_loss, train_data=texts)


def _llama(width: int, layers: int, vocabulary: int, *, tied: bool = True) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64 or 2,
            num_key_value_heads=width // 64 or 2,
            tie_word_embeddings=tied,
            max_position_embeddings=LENGTH,
        )
    )


def _large_decoder(layers: int) -> nn.Module:
    """Return a decoder of 42 million weights a block, of which the norms are trained."""
    model = _llama(2048, layers, 1024)
    for name, one in model.named_parameters():
        one.requires_grad_("norm" in name)
    return model


class DrawnTensors(Mapping[str, Array]):
    """Random tensors of a model, each drawn when it is read."""

    def __init__(self, model: nn.Module) -> None:
        self._shapes = {name: tuple(one.shape) for name, one in model.state_dict().items()}

    def __getitem__(self, name: str) -> Array:
        shape = self._shapes[name]
        if len(shape) < 2:
            return np.ones(shape, np.float32)
        draw = np.random.default_rng(len(name))
        return draw.standard_normal(shape, np.float32) * np.float32(0.02)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _drawn(layers: int, folder: Path) -> Tree:
    """Return the large decoder's tensors, in a file: this machine need not hold them either."""
    with without_weights():
        model = _large_decoder(layers)
    with (folder / "drawn").open("wb") as file:
        write_tree(DrawnTensors(model), file)
    return SpooledTree(folder / "drawn")


def smollm2() -> nn.Module:
    """Return SmolLM2-135M-Instruct with LoRA adapters; the structure alone if asked."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    if structure_only():
        model: nn.Module = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=49152,
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=30,
                num_attention_heads=9,
                num_key_value_heads=3,
                tie_word_embeddings=True,
                max_position_embeddings=8192,
                rope_theta=100_000.0,
                rms_norm_eps=1e-5,
            )
        )
    else:
        path = model_file()
        model = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    adapters = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    adapted: nn.Module = get_peft_model(model, adapters)  # type: ignore[arg-type]
    return adapted


def _digits() -> Task:
    return load_task(str(ROOT / "examples" / "split_training" / "digits"))


WORKLOADS: Mapping[str, SplitWorkload] = {
    one.key: one
    for one in (
        SplitWorkload(key="cnn", name="CNN", task=lambda: _picture_task(BenchNet), cut="first"),
        SplitWorkload(key="vit", name="small ViT", task=lambda: _picture_task(BenchViT), cut="vit.vit.layers.1"),
        SplitWorkload(
            key="decoder",
            name="small decoder, U-shaped",
            task=lambda: _token_task(lambda: _llama(64, 4, 256), 256),
            cut="1",
            last_cut="3",
        ),
        SplitWorkload(
            key="smollm2",
            name="SmolLM2-135M with LoRA, U-shaped",
            task=lambda: _token_task(smollm2, 49152, 40),
            cut="2",
            last_cut="30",
            batch_size=2,
            lr=0.005,  # at 0.05 random tokens make it diverge, and with it roundings grow
        ),
        SplitWorkload(key="digits", name="digits", task=_digits, cut="eyes", batch_size=32, lr=0.1),
        SplitWorkload(
            key="smollm2-u",
            name="SmolLM2-135M with LoRA, U-shaped",
            task=lambda: _token_task(smollm2, 49152, 8),
            cut="1",
            last_cut="30",
            batch_size=2,
            limit_mb=512,
        ),
        *(
            SplitWorkload(
                key=key,
                name="random decoder, U-shaped",
                task=lambda layers=layers: _token_task(lambda: _large_decoder(layers), 1024, 8),
                cut="0",
                last_cut=str(layers),
                batch_size=2,
                limit_mb=384,
                tensors=partial(_drawn, layers),
            )
            for key, layers in (("large", 24), ("large-quick", 2))
        ),
    )
}
