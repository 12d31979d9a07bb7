"""Twenty steps in parts equal twenty steps of the whole model, for any number of micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from edgefl import Task
from edgefl.config import TrainConfig
from edgefl.offload.training.decoder import decoder_parts, is_decoder
from edgefl.offload.training.halves import DeviceHalf, MicroBatch
from edgefl.offload.training.parts import ModelParts
from edgefl.offload.training.traced import input_values, one_name_each, traced_parts
from edgefl.offload.training.trial import halves_of, take_step
from edgefl.training.local import make_model
from edgefl.training.steps.descent import Autograd, Descent
from tests.edgefl.offload.training.models import NormedNet, adamw, decoder, momentum, picture_task, token_task, vit

STEPS, BATCH = 20, 8


def made(model: torch.nn.Module, cut: str, last_cut: str, inputs: Any, known: dict[Any, ModelParts]) -> ModelParts:
    if is_decoder(model):
        return known.setdefault("blocks", decoder_parts(model, cut, last_cut))
    key = tuple(inputs.shape)
    if key not in known:
        known[key] = traced_parts(model, inputs, cut, last_cut)
    return known[key]


def batches(task: Task) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    assert task.train_data is not None
    inputs, targets = task.train_data()
    for step in range(STEPS):
        at = torch.arange(step * 3, step * 3 + BATCH) % len(inputs)
        yield inputs[at], targets[at]


@pytest.mark.parametrize("micro_batches", [1, 3])  # 3 of 8: parts of unequal size
@pytest.mark.parametrize(
    ("task", "cut", "last_cut"),
    [
        (picture_task(), "first", ""),
        (picture_task(), "second", "norm"),
        (picture_task(optimizer=adamw), "relu", "norm"),
        (picture_task(vit), "vit.vit.layers.0", ""),
        (picture_task(vit, optimizer=momentum), "vit.vit.layers.0", "vit.vit.layers.1"),
        (token_task(optimizer=adamw), "1", "2"),  # a tied head beside its embedding
        (token_task(lambda: decoder(tied=False)), "model.layers.0", ""),
    ],
    ids=["cnn", "cnn-u", "cnn-u-adamw", "vit", "vit-u", "decoder-u-tied", "decoder"],
)
def test_twenty_steps_in_parts_are_twenty_steps(task: Task, cut: str, last_cut: str, micro_batches: int) -> None:
    config = TrainConfig(lr=0.002 if task.optimizer is adamw else 0.05, seed=3)
    whole = make_model(task, seed=3).train()
    known: dict[Any, ModelParts] = {}
    parts = made(whole, cut, last_cut, next(batches(task))[0][: BATCH // micro_batches], known)
    device, cloud = halves_of(task, whole, parts, config)
    descent = Descent(task, Autograd(task, whole))
    descent.begin(config)
    for step, (inputs, targets) in enumerate(batches(task)):
        loss = float(descent.take(inputs, targets))
        slices = torch.arange(BATCH).tensor_split(micro_batches)
        micro = [
            (
                MicroBatch(step=step, number=n, share=len(at) / BATCH),
                made(whole, cut, last_cut, inputs[at], known), inputs[at], targets[at],
            )
            for n, at in enumerate(slices)
        ]  # fmt: skip
        assert take_step(device, cloud, micro) == pytest.approx(loss, rel=1e-4)
    tensors, names = {**device.state.tensors, **cloud.state.tensors}, one_name_each(whole)
    assert {names[name] for name, _ in whole.named_parameters()} <= tensors.keys()
    moved = 0.0
    begin = dict(make_model(task, seed=3).named_parameters())
    for name, one in whole.named_parameters():
        assert (tensors[names[name]] - one).abs().max() <= 1e-5, name
        moved = max(moved, float((one - begin[name]).detach().abs().max()))
    assert moved > 1e-3  # it did train


def test_the_running_statistics_of_batch_norm_are_those_of_the_whole_model() -> None:
    task = picture_task(NormedNet)
    whole = make_model(task, seed=1).train()
    parts = traced_parts(whole, next(batches(task))[0], "norm")
    device, cloud = halves_of(task, whole, parts, TrainConfig(seed=1))
    descent = Descent(task, Autograd(task, whole))
    descent.begin(TrainConfig(seed=1))
    for step, (inputs, targets) in enumerate(batches(task)):
        descent.take(inputs, targets)
        take_step(device, cloud, [(MicroBatch(step=step, number=0, share=1.0), parts, inputs, targets)])
    state = whole.state_dict()
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert torch.allclose(device.state.tensors[name].float(), state[name].float(), atol=1e-5), name
    assert int(device.state.tensors["norm.num_batches_tracked"]) == STEPS


def test_dropout_draws_the_same_numbers_when_a_micro_batch_is_repeated_and_others_in_the_next_step() -> None:
    class Dropping(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.drop, self.head = torch.nn.Linear(64, 32), torch.nn.Dropout(0.5), torch.nn.Linear(32, 10)

        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            return self.head(self.drop(self.first(torch.flatten(pictures, 1))))

    task = picture_task(Dropping)
    inputs = next(batches(task))[0]
    model = make_model(task)
    parts = traced_parts(model, inputs, "drop")
    device, _ = halves_of(task, model, parts, TrainConfig())

    def crossed(half: DeviceHalf, step: int) -> torch.Tensor:
        one = half.forward(parts, input_values(inputs), MicroBatch(step=step, number=0, share=1.0))
        return next(iter(half.crossing(one)[0].values()))

    assert torch.equal(crossed(device, 4), crossed(device, 4))
    assert not torch.equal(crossed(device, 4), crossed(device, 5))


def test_a_snapshot_continues_as_if_nothing_had_happened() -> None:
    task = picture_task(optimizer=adamw)
    model = make_model(task)
    parts = traced_parts(model, next(batches(task))[0], "first")
    config = TrainConfig(proximal_mu=0.1, lr=0.01)
    device, cloud = halves_of(task, model, parts, config)
    kept: list[dict[str, Any]] = []
    for step, (inputs, targets) in enumerate(batches(task)):
        if step == 7:
            kept = [half.state.snapshot() for half in (device, cloud)]
        take_step(device, cloud, [(MicroBatch(step=step, number=0, share=1.0), parts, inputs, targets)])
    again, there = halves_of(task, model, parts, config)
    again.state.restore(kept[0])
    there.state.restore(kept[1])
    for step, (inputs, targets) in list(enumerate(batches(task)))[7:]:
        take_step(again, there, [(MicroBatch(step=step, number=0, share=1.0), parts, inputs, targets)])
    for one, other in ((device, again), (cloud, there)):
        assert all(torch.equal(one.state.tensors[name], other.state.tensors[name]) for name in one.state.tensors)
