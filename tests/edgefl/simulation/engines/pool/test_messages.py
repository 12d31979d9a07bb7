"""What travels to a worker: a reference, or a task that can be found again."""

import dataclasses
import pickle

import pytest

from edgefl.errors import ConfigError
from edgefl.simulation.engines.pool.messages import Start, import_path, pickled_task


def start(setup, task):
    return Start(
        reference=None, task=task, make_population=setup.make_population, config=setup.config, spec={},
        parameters=0, sums=0, frozen_spec={}, frozen=0, import_path=import_path(),
    )  # fmt: skip


def test_a_task_that_can_be_loaded_again_is_not_sent(set_up):
    setup = set_up()
    assert pickled_task(setup) is None
    loaded = dataclasses.replace(start(setup, None), reference=setup.reference).load_task()
    assert loaded.name == "small"


def test_a_task_object_is_sent_where_its_parts_have_names(set_up):
    setup = dataclasses.replace(set_up(), reference=None)
    again = start(setup, pickled_task(setup)).load_task()
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


def test_what_is_no_task_is_refused(set_up):
    with pytest.raises(ConfigError, match="sent a dict"):
        start(set_up(), pickle.dumps({})).load_task()
