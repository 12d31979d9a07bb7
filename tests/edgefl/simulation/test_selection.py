"""Simulated clients are selected, drawn by utility and stopped as devices are."""

from __future__ import annotations

import numpy as np
import pytest

from edgefl.errors import ConfigError
from edgefl.simulation.simulate import simulate
from edgefl.task import FitResult, Task

TAGS = {"population.tags": {"site": ["a", "b"]}}


def fit(_parameters, _config, options):
    number = float(options["part"])
    return FitResult(tree={"w": np.ones(2, np.float32)}, weight=1.0 + number, metrics={"loss": number})


TASK = Task(name="t", initial=lambda: {"w": np.zeros(2, np.float32)}, fit=fit)


def run(rounds=3, clients=10, **settings):
    return simulate(TASK, clients=clients, rounds=rounds, engine="loop", set=TAGS | settings)


def took_part(result):
    return [int(at) for at in np.flatnonzero(result.took_part)]


def test_by_tag_and_name():
    result = run(**{"rounds.select": "tag.site == 'b' and name != 'client-3'"})
    assert took_part(result) == [1, 5, 7, 9]
    assert [one.admitted for one in result.rounds] == [4, 4, 4]


def test_by_what_was_learnt():
    result = run(**{"rounds.select": "staleness < 1 or rounds < 1", "rounds.clients": 5})
    assert [one.admitted for one in result.rounds] == [5, 5, 5]
    never_again = run(**{"rounds.select": "rounds < 1", "rounds.clients": 3})
    assert sorted(never_again.took_part.tolist()) == [0] + [1] * 9


def test_in_virtual_time_by_memory():
    memory = {"population.devices.memory_mb": {"kind": "uniform", "min": 500.0, "max": 1500.0}}
    some = run(clients=30, **memory, **{"rounds.select": "mem_mb >= 1000"})
    assert 3 < some.rounds[0].admitted < 27


def test_by_utility_the_same_again_and_not_by_sums():
    first, second = (run(rounds=20, **{"rounds.utility": "oort", "rounds.clients": 3}) for _ in range(2))
    assert first.took_part.tolist() == second.took_part.tolist()
    other = run(rounds=20, **{"rounds.utility": "random", "rounds.clients": 3})
    assert first.took_part.tolist() != other.took_part.tolist()


def test_it_continues_from_a_checkpoint_with_the_same_choice(tmp_path):
    settings = TAGS | {"rounds.utility": "oort", "rounds.clients": 3}
    whole = simulate(TASK, clients=10, rounds=12, engine="loop", set=settings)
    simulate(TASK, clients=10, rounds=5, engine="loop", set=settings, checkpoint=tmp_path)
    rest = simulate(TASK, rounds=12, engine="loop", resume=tmp_path)
    assert rest.took_part.tolist() == whole.took_part.tolist()


def test_early_stop():
    stop = {"rounds.stop.metric": "train_loss", "rounds.stop.patience": 2}
    result = run(rounds=30, **stop)
    assert (len(result.rounds), result.interrupted) == (3, False)
    assert result.stopped == "train_loss has not improved since round 1 (6); it is round 3"
    assert result.as_json()["stopped"] == result.stopped


@pytest.mark.parametrize(
    ("select", "complaint"),
    [
        ("battery_percent > 50", "reads battery_percent, which simulated clients do not have"),
        ("tag.room == 'x'", r"reads tag.room, .* they have .*tag.site. Add tags"),
    ],
)
def test_fields_that_simulated_clients_lack(select, complaint):
    with pytest.raises(ConfigError, match=complaint):
        run(**{"rounds.select": select})


def test_nobody_meets_it():
    with pytest.raises(Exception, match=r"0 clients are available that meet rounds\.select.*widen rounds\.select"):
        run(**{"rounds.select": "name == 'nobody'"})
