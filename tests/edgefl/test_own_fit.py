"""A task's own fit: all tensors go in, an update of those that are trained comes out."""

import numpy as np
import pytest

from edgefl import FitResult, Task
from edgefl.config import TrainConfig
from edgefl.errors import TaskError
from edgefl.own_fit import fit_of

MOVING, FROZEN = {"b": np.zeros(1)}, {"a": np.full(1, 5.0)}


def task(fit):
    return Task(name="own", initial=lambda: {**FROZEN, **MOVING}, fit=fit, trained=["b"])


def test_fit_sees_every_tensor_and_returns_what_is_trained():
    def fit(tree, _config, _options):
        return FitResult(tree={"b": tree["a"] - tree["b"]}, weight=2)

    result = fit_of(task(fit), MOVING, TrainConfig(), {}, FROZEN)
    assert (result.tree["b"].tolist(), result.weight) == ([5.0], 2.0)


def test_a_frozen_tensor_in_the_update_is_refused_by_name():
    with pytest.raises(TaskError, match="cannot be an update: tensors unknown: a"):
        fit_of(task(lambda tree, *_: FitResult(tree=tree, weight=1)), MOVING, TrainConfig(), {}, FROZEN)
