"""Where a client begins, what it sends and what it keeps: by hand over rounds."""

from __future__ import annotations

import numpy as np
import pytest

from edgefl.config import TrainConfig
from edgefl.errors import ConfigError, TaskError
from edgefl.task import FitResult, Task
from edgefl.training.steps.client_state import begin_from, model_state, refuse_unkept
from edgefl.trees import Tree

MODEL = {"a": np.array([1.0]), "b": np.array([2.0])}  # a is sent in odd rounds, b in even ones


def in_round(number: int) -> TrainConfig:
    return TrainConfig(round=number, fragments=2)


def moved(tree: Tree, by: float) -> dict[str, np.ndarray]:
    return {name: array + by for name, array in tree.items()}


def values(tree: Tree) -> dict[str, float]:
    return {name: float(array[0]) for name, array in tree.items()}


def test_three_rounds_by_hand() -> None:
    first = begin_from(MODEL, None, in_round(1))
    assert (values(first.start), values(first.sent)) == ({"a": 1.0, "b": 2.0}, {"a": 1.0})
    state = model_state(first, moved(first.start, 10.0), in_round(1))  # own values: a 11, b 12
    second = begin_from({"a": np.array([5.0])}, state, in_round(2))  # the server has moved a to 5
    assert values(second.start) == {"a": 5.0, "b": 12.0}
    assert values(second.base) == {"a": 5.0, "b": 2.0}  # the global model
    assert values(second.sent) == {"b": 2.0}  # so b's change is that of two rounds
    state = model_state(second, moved(second.start, 10.0), in_round(2))  # own values: a 15, b 22
    third = begin_from({"b": np.array([7.0])}, state, in_round(3))
    assert (values(third.start), values(third.base), values(third.sent)) == (
        {"a": 15.0, "b": 7.0}, {"a": 5.0, "b": 7.0}, {"a": 5.0},
    )  # fmt: skip


def test_the_whole_model_replaces_all_that_was_kept() -> None:
    state = model_state(begin_from(MODEL, None, in_round(1)), moved(MODEL, 10.0), in_round(1))
    begun = begin_from(MODEL, state, in_round(5))
    assert values(begun.start) == values(begun.base) == values(MODEL)
    assert values(begun.sent) == {"a": 1.0}


def test_without_fragments_nothing_of_the_model_is_kept() -> None:
    begun = begin_from(MODEL, {"optimizer/0/step": np.array(1.0)}, TrainConfig())
    assert begun.start is begun.base is begun.sent is MODEL
    assert model_state(begun, MODEL, TrainConfig()) == {}


def test_a_part_alone_cannot_be_divided() -> None:
    with pytest.raises(TaskError, match="what this client has of the model cannot be divided"):
        begin_from({"a": np.array([5.0])}, None, in_round(2))


def test_what_cannot_be_divided_is_refused_before_the_job() -> None:
    own = Task(name="own", initial=dict, fit=lambda *_: FitResult(tree={}, weight=1))
    refuse_unkept(own, TrainConfig(), 1, MODEL)
    with pytest.raises(ConfigError, match=r"server.fragments=2: task 'own' has its own fit"):
        refuse_unkept(own, TrainConfig(), 2, MODEL)
    with pytest.raises(ConfigError, match=r"server.fragments=3: the model has 2 tensors"):
        refuse_unkept(Task(name="t", model=dict, loss=max, train_data=tuple), TrainConfig(), 3, MODEL)
