"""A decoder inverts an easy head, from maps and from vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgefl.offload.decoder import train_decoder


@pytest.mark.parametrize("seen", [("maps",), ("vector",), ("maps", "vector")])
def test_pictures_come_back(seen):
    rng = np.random.default_rng(0)
    truth = (5 + rng.normal(size=(40, 2, 1, 1)) * np.ones((40, 2, 12, 10))).astype(np.float32)
    given = {"maps": -truth[:, :, ::2, ::2], "vector": truth[:, :, 0, 0] * 7}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = [{name: given[name][rows] for name in seen} for rows in (slice(30), slice(30, None))]
        made = train_decoder(parts[0], truth[:30], parts[1], steps=300, batch=16, width=8)
    assert made.shape == (10, 2, 12, 10)
    assert np.square(made - truth[30:]).mean() < 0.25 * truth.var()
