"""What all kinds of model share: samples by seed, unequal parts, held-out data."""

from __future__ import annotations

import numpy as np

from edgefl import Task

PART_SIZES = (64, 48)  # samples of each client, so that weights matter
HELD_OUT = 160


def torch_task(name, model, loss, samples, **more):
    """Return a task whose data are `samples(rng, count)`, different in each part."""
    return Task(
        name=name,
        model=model,
        loss=loss,
        train_data=lambda part="0", parts="1": samples(np.random.default_rng(1 + int(part)), PART_SIZES[int(part)]),
        test_data=lambda: samples(np.random.default_rng(0), HELD_OUT),
        **more,
    )


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)
