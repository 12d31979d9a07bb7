"""What travels to a worker: a reference, or a task that can be found again."""

import dataclasses
import pickle
import sys

import pytest

from edgefl.errors import ConfigError
from edgefl.simulation.engines.pool.messages import import_path, pickled_task


def test_a_task_that_can_be_loaded_again_is_not_sent(set_up):
    setup = set_up()
    assert pickled_task(setup) is None


def test_a_task_object_is_sent_where_its_parts_have_names(set_up):
    setup = dataclasses.replace(set_up(), reference=None)
    again = pickle.loads(pickled_task(setup))  # noqa: S301 - our own
    assert again.train_data is setup.task.train_data


@pytest.mark.parametrize("how", ["nameless", "main"])
def test_one_whose_parts_have_none_is_refused(set_up, how):
    setup = set_up("dropout")
    if how == "main":

        def loss(_outputs, _targets):
            return None

        loss.__module__, loss.__qualname__ = "__main__", "loss"
        __import__("__main__").loss = loss
        setup = dataclasses.replace(setup, task=dataclasses.replace(set_up().task, loss=loss))
    with pytest.raises(ConfigError, match="cannot be sent to worker processes"):
        pickled_task(dataclasses.replace(setup, reference=None))


def test_the_import_path_is_this_processes():
    assert import_path() == tuple(map(str, sys.path))
