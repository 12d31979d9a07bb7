"""A loss of the device's own: gradients of its part, a head that is kept, and models that cannot have one."""

from __future__ import annotations

import pytest
import torch

from edgefl.config import TrainConfig
from edgefl.errors import ConfigError
from edgefl.offload.training.auxiliary import AuxiliaryLoss
from edgefl.offload.training.decoder import decoder_parts
from edgefl.offload.training.halves import MicroBatch
from edgefl.offload.training.traced import input_values, traced_parts
from edgefl.offload.training.trial import halves_of
from edgefl.training.local import make_model
from tests.edgefl.offload.training.models import picture_task, pictures, token_task, tokens

MICRO = MicroBatch(step=0, number=0, share=1.0)


def test_the_loss_falls_and_the_head_is_kept_for_the_next_round() -> None:
    task, config = picture_task(), TrainConfig(lr=0.1)
    model, (inputs, targets) = make_model(task), pictures()
    parts = traced_parts(model, inputs, "second")
    device, _ = halves_of(task, model, parts, config)
    auxiliary, losses = AuxiliaryLoss(task, config), []
    for _ in range(30):
        losses.append(auxiliary.learn(device.forward(parts, input_values(inputs), MICRO), targets))
        device.state.step(torch.tensor(0.0))
    assert losses[-1] < losses[0] - 0.01
    again = AuxiliaryLoss(task, config, auxiliary.state())
    assert again.learn(device.forward(parts, input_values(inputs), MICRO), targets) < losses[0] - 0.01
    assert auxiliary.state()["auxiliary/weight"].shape == (10, 8 + 4)  # channels of both tensors that cross


def test_a_language_model_has_none() -> None:
    task = token_task()
    model = make_model(task)
    parts = decoder_parts(model, "1")
    device, _ = halves_of(task, model, parts, TrainConfig())
    with pytest.raises(ConfigError, match=r"needs a model that returns one tensor \(N, K\)"):
        AuxiliaryLoss(task, TrainConfig()).learn(
            device.forward(parts, input_values(tokens()[0][:2]), MICRO), tokens()[1][:2]
        )
