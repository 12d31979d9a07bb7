"""The models to split have the shape of what they are named after."""

from __future__ import annotations

import pytest
import torch

from benchmarks import offload_models


@pytest.mark.parametrize(("name", "least"), [("alexnet", 1_000_000), ("mobilenet", 20_000), ("vit", 200_000)])
def test_a_model_takes_its_pictures(name, least):
    model, inputs = offload_models.make_model(name), offload_models.pictures(name, 2)
    with torch.no_grad():
        outputs = model(inputs)
    assert outputs.shape == (2, 10)
    assert sum(one.numel() for one in model.parameters()) > least
    assert torch.equal(offload_models.pictures(name, 2), inputs)
    again = offload_models.make_model(name)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
