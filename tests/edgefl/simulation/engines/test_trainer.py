"""The cheaper trainer gives what a device's training gives: bit for bit, or to rounding where it fuses."""

import numpy as np
import pytest

from edgefl.errors import ConfigError
from edgefl.records import Failure
from edgefl.simulation.engines.trainer import LocalTrainer
from edgefl.training.local import train_locally


def same(update, result, *, ulps):
    assert update.weight == result.weight
    coarsest = max(np.finfo(array.dtype).eps for array in result.tree.values() if array.dtype.kind == "f")
    assert dict(update.metrics) == pytest.approx(dict(result.metrics), rel=ulps * float(coarsest), abs=0)
    assert list(update.tree) == list(result.tree)
    for name, array in result.tree.items():
        within = ulps * np.finfo(array.dtype).eps if array.dtype.kind == "f" else 0
        np.testing.assert_allclose(update.tree[name], array, rtol=0, atol=within)
        assert update.tree[name].dtype == array.dtype


@pytest.mark.parametrize("name", ["task", "dropout", "norm", "half", "adam", "own_fit"])
@pytest.mark.parametrize("train", [{}, {"algorithm": "fedsgd"}, {"proximal_mu": 0.5}])
def test_one_model_for_all_gives_what_each_device_gives(set_up, plan_of, name, train):
    setup = set_up(name, clients=4, train={"batch_size": 4, "epochs": 2, "lr": 0.3} | train)
    fused = not train and name not in ("adam", "own_fit")  # w - lr * a @ b, rounded once
    plan, trainer = plan_of(setup), LocalTrainer(setup.task, setup.population)
    trainer.begin(plan)
    for client in (*plan.clients[1:], *plan.clients[1:2]):  # the second time on a model that has been used
        options = setup.population.options(client)
        wanted = train_locally(
            setup.task, plan.parameters, plan.train, options=options, round=1, client=client, frozen=plan.frozen
        )
        same(trainer.train(client), wanted, ulps=8 if fused else 0)


def test_a_client_without_data_fails_by_itself(set_up, plan_of):
    setup = set_up(clients=2, data={"empty": "0"})
    trainer = LocalTrainer(setup.task, setup.population)
    with pytest.raises(RuntimeError, match="begin comes before"):
        trainer.train("client-0")
    trainer.begin(plan_of(setup))
    answer = trainer.train("client-0")
    assert isinstance(answer, Failure)
    assert "no data" in answer.reason


def test_a_fit_that_reads_options_needs_a_population_that_has_some(set_up):
    with pytest.raises(ConfigError, match="has its own fit"):
        LocalTrainer(set_up("own_fit").task, object())
