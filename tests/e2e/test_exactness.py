"""Real processes over TLS compute what one process computes by hand."""

import sys
from pathlib import Path

import numpy as np
import torch


def test_fedavg_is_the_weighted_mean_worked_out_by_hand(fleet, tmp_path):
    for name, delta, weight in (("a", 1.0, 1), ("b", 4.0, 2), ("c", 10.0, 5)):
        fleet.add_agent(name, delta=delta, weight=weight, calls=tmp_path / f"{name}.calls")
    result, model = fleet.run_task("numbers", "rounds.clients=3", "rounds.quorum=3", rounds=2)
    mean = (1 * 1.0 + 2 * 4.0 + 5 * 10.0) / 8  # 7.375
    np.testing.assert_allclose(model["w"], np.full(3, 2 * mean), rtol=1e-6)
    assert model["n"] == 2
    assert [entry["admitted"] for entry in result["rounds"]] == [3, 3]
    assert result["rounds"][0]["metrics"]["train_delta"] == mean


def test_one_fedsgd_step_is_one_centralised_full_batch_step(embedded_fleet, monkeypatch):
    for part in range(3):
        embedded_fleet.add_agent(f"part-{part}", part=part)
    settings = ("train.algorithm=fedsgd", "train.batch_size=4", "server.lr=0.05", "rounds.clients=3")
    result, federated = embedded_fleet.run_task("linear", *settings, "rounds.quorum=3")

    monkeypatch.syspath_prepend(str(Path(__file__).parent / "tasks" / "linear"))
    import linear_task

    model = linear_task.make_model()
    inputs, targets = (torch.from_numpy(array) for array in linear_task.everything())
    torch.nn.functional.mse_loss(model(inputs), targets).backward()
    for name, parameter in model.named_parameters():
        expected = (parameter - 0.05 * parameter.grad).detach().numpy()  # w <- w - lr * (1/N) * sum of gradients
        np.testing.assert_allclose(federated[name], expected, rtol=0, atol=1e-6)
    assert result["rounds"][0]["admitted"] == 3
    sys.modules.pop("linear_task")
