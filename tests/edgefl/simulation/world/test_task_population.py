"""Clients from the task's own loader: which part is whose, what is kept, what is refused."""

import pytest

from edgefl.errors import ConfigError, TaskError
from edgefl.simulation.world.population import PopulationConfig, make_population
from edgefl.simulation.world.task_population import TaskPopulation


def test_client_i_gets_part_i_and_the_other_options(set_up):
    setup = set_up(clients=3, data={"empty": "1"})
    assert list(setup.population.names()) == ["client-0", "client-1", "client-2"]
    assert setup.population.options("client-2") == {"empty": "1", "part": "2", "parts": "3"}
    assert len(setup.population.samples("client-2")) == 11
    with pytest.raises(TaskError, match="no data"):
        setup.population.samples("client-1")


def test_samples_are_loaded_once(set_up):
    population = set_up(clients=5).population
    first = population.samples("client-0")
    assert population.samples("client-0") is first


def test_a_million_clients_cost_nothing_until_they_are_asked(set_up):
    population = set_up(clients=1_000_000).population
    assert len(population.names()) == 1_000_000
    assert len(population.samples("client-999999")) == 1 + 5 * 999_999 % 17


def test_a_loader_that_cannot_part_its_data_is_refused(set_up):
    with pytest.raises(ConfigError, match="takes no `part` and `parts`"):
        set_up("partless")
    with pytest.raises(ConfigError, match="expected 1 or more"):
        TaskPopulation(set_up().task, 0, {})


def test_an_option_that_no_loader_takes_is_refused_before_the_first_round(set_up):
    with pytest.raises(ConfigError, match=r"train_data takes no data option 'wrong'; it takes part, parts, empty, inf"):
        set_up(clients=3, data={"empty": "1", "wrong": "1"})
    config = PopulationConfig(clients=3, partitioner="iid", data={"wrong": "1"})
    with pytest.raises(ConfigError, match="takes no data option 'wrong'"):
        make_population(set_up().task, config)
