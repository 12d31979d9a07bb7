"""A split that computes something else is refused before it is used."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from edgefl.errors import ParityError
from edgefl.offload.training.traced import traced_parts
from edgefl.offload.training.trial import TOLERANCE, check_parts
from edgefl.training.local import make_model
from tests.edgefl.offload.training.models import picture_task, pictures


def test_gradients_in_parts_are_those_of_the_whole_or_refused() -> None:
    task = picture_task()
    model, inputs, targets = make_model(task), pictures()[0][:4], pictures()[1][:4]
    parts = traced_parts(model, inputs, "first", "norm")
    assert check_parts(task, model, parts, inputs, targets) <= TOLERANCE

    class Doubling:
        def __init__(self, part: object) -> None:
            self.needs, self.gives, self.tensors = part.needs, part.gives, part.tensors  # type: ignore[attr-defined]
            self._part = part

        def run(self, state: object, values: object) -> dict[str, torch.Tensor]:
            found = self._part.run(state, values)  # type: ignore[attr-defined]
            return {name: one * 1.001 for name, one in found.items()}

    wrong = dataclasses.replace(parts, parts=[parts.parts[0], Doubling(parts.parts[1]), parts.parts[2]])
    with pytest.raises(ParityError, match="a step in parts differs from the whole model's"):
        check_parts(task, model, wrong, inputs, targets)
