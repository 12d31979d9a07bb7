"""Federated evaluation in simulations: the same numbers in every engine, by hand, on its schedule, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import edgefl
from edgefl import EvalResult, FitResult, SimulationResult, Task
from edgefl.records import RoundReport
from edgefl.training.samples import Samples

CLIENTS = 12


def _data(part: str = "0", parts: str = "1") -> tuple[Any, Any]:
    rng = np.random.default_rng(int(part))
    inputs = rng.normal(size=(20 + int(part), 4)).astype(np.float32)
    return inputs, (inputs[:, 0] + 0.5 * inputs[:, 1] > 0).astype(np.int64)


def _held_out(part: str = "0", parts: str = "1") -> tuple[Any, Any]:
    inputs, targets = _data(str(100 + int(part)))
    few = 3 + int(part) % 3
    return inputs[:few], targets[:few]


def _some_held_out(part: str = "0", parts: str = "1") -> tuple[Any, Any]:
    """Client 0 has no held-out samples, and client 1 cannot read them."""
    if part == "1":
        raise OSError("the card is missing")
    inputs, targets = _held_out(part)
    return (inputs, targets) if part != "0" else (inputs[:0], targets[:0])


def _model() -> nn.Module:
    return nn.Linear(4, 2)


def _accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    return (outputs.argmax(1) == targets).float().mean().item()


def _task(**changes: Any) -> Task:
    known: dict[str, Any] = {
        "name": "signs", "model": _model, "loss": nn.functional.cross_entropy, "train_data": _data,
        "eval_data": _held_out, "metrics": {"accuracy": _accuracy},
    }  # fmt: skip
    return Task(**known | changes)


def _simulated(task: Task | None = None, engine: str = "loop", **settings: Any) -> SimulationResult:
    chosen = {"rounds.count": 3, **settings}
    return edgefl.simulate(task or _task(), clients=CLIENTS, engine=engine, set=chosen)


def _devices(metrics: Any) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith("devices/")}


def test_a_round_has_the_metrics_of_the_parameters_before_it_and_final_those_of_the_last() -> None:
    result, one_round_less = _simulated(), _simulated(**{"rounds.count": 2})
    assert _devices(result.rounds[2].metrics) == _devices(one_round_less.final)
    with torch.no_grad():
        model = _model()
        model.load_state_dict({name: torch.from_numpy(np.array(one)) for name, one in result.parameters.items()})
        right = total = 0.0
        for part in map(str, range(CLIENTS)):
            inputs, targets = map(torch.from_numpy, _held_out(part))
            right += _accuracy(model(inputs), targets) * len(targets)
            total += len(targets)
    assert result.final["devices/accuracy"] == pytest.approx(right / total)
    assert result.final["devices/count"] == CLIENTS


@pytest.mark.parametrize(("engine", "clients"), [("stacked", 0), ("stacked", 5), ("pool", 0), ("auto", 5)])
def test_engines_agree(engine: str, clients: int) -> None:
    loop, other = (_simulated(engine=one, **{"rounds.clients": clients}) for one in ("loop", engine))
    for one, two in zip(loop.rounds, other.rounds, strict=True):
        assert _devices(two.metrics) == pytest.approx(_devices(one.metrics), abs=1e-6)
    assert len(_devices(other.final)) == 7
    assert other.final == pytest.approx(loop.final, abs=1e-6)


def test_the_pool_of_stacks_agrees() -> None:
    from edgefl.config import JobConfig
    from edgefl.records import Plan
    from edgefl.simulation.engines.fleets import TrainingMethod
    from edgefl.simulation.engines.pool.chunks import ChunkTrainer
    from edgefl.simulation.engines.pool.messages import Chunk, Flush, Summed
    from edgefl.simulation.world.task_population import TaskPopulation
    from edgefl.training import initial_parameters

    task, names = _task(), None
    population = TaskPopulation(task, CLIENTS, {})
    names = tuple(population.names())
    trainer = ChunkTrainer(task, population, JobConfig())
    plan = Plan(job="j", round=1, parameters=initial_parameters(task), clients=names, train=JobConfig().train,
                deadline_s=9.0, evaluate=True)  # fmt: skip
    trainer.begin(plan, sums=True, method=TrainingMethod(stacks=True))
    trainer.answer(Chunk(names))
    summed = trainer.answer(Flush())
    assert isinstance(summed, Summed)
    assert summed.partial is not None
    assert summed.partial.evaluations is not None
    assert summed.partial.evaluations.count == CLIENTS


@pytest.mark.parametrize(("every", "expected"), [(0, []), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5])])
def test_the_schedule(every: int, expected: list[int]) -> None:
    result = _simulated(**{"rounds.count": 5, "rounds.evaluate_every": every})
    assert [one.round for one in result.rounds if _devices(one.metrics)] == expected
    assert bool(_devices(result.final)) == (every > 0)


@pytest.mark.parametrize("engine", ["loop", "stacked", "pool"])
def test_a_client_that_cannot_evaluate_trains_all_the_same(engine: str) -> None:
    result, undisturbed = _simulated(_task(eval_data=_some_held_out), engine), _simulated(engine=engine)
    for one in result.rounds:
        assert (one.admitted, one.failed) == (CLIENTS, 0)
        assert one.metrics["devices/count"] == CLIENTS - 2
        assert sorted(one.not_evaluated) == ["client-00", "client-01"]
        assert "eval_data returned 0 samples" in one.not_evaluated["client-00"]
        assert f"eval_data raised OSError: the card is missing ({__file__}:" in one.not_evaluated["client-01"]
    assert result.model["sha256"] == undisturbed.model["sha256"]
    assert sorted(result.last_evaluation.not_evaluated) == ["client-00", "client-01"]
    assert RoundReport.from_json(result.rounds[0].as_json()) == result.rounds[0]


def test_a_task_without_eval_data_has_no_metrics_of_devices() -> None:
    without, evaluated = _simulated(_task(eval_data=None)), _simulated()
    assert not any(_devices(one.metrics) for one in without.rounds)
    assert "not_evaluated" not in without.rounds[0].as_json()
    assert without.model["sha256"] == evaluated.model["sha256"]  # evaluation changes nothing of the training


def test_a_resumed_simulation_has_the_same_metrics(tmp_path: Path) -> None:
    straight = _simulated()
    edgefl.simulate(_task(), clients=CLIENTS, rounds=1, engine="loop", checkpoint=tmp_path)
    resumed = edgefl.simulate(_task(), clients=CLIENTS, rounds=3, engine="loop", resume=tmp_path)
    assert [one.metrics for one in resumed.rounds[1:]] == [one.metrics for one in straight.rounds[1:]]
    assert resumed.final == straight.final
    again = edgefl.simulate(_task(), clients=CLIENTS, rounds=3, engine="loop", resume=tmp_path)
    assert again.final == straight.final


def _own_evaluation(tree: Any, options: Any) -> EvalResult:
    return EvalResult(metrics={"gain": float(tree["w"][0]) + int(options["part"])}, weight=1.0)


def test_a_task_with_fit_is_evaluated_by_its_own_function() -> None:
    task = Task(
        name="own", initial=lambda: {"w": np.zeros(1, np.float32)},
        fit=lambda tree, _config, _options: FitResult(tree={"w": np.ones_like(tree["w"])}, weight=1.0),
        evaluate_locally=_own_evaluation, higher_is_better={"gain": True},
    )  # fmt: skip
    result = edgefl.simulate(task, clients=4, rounds=2, engine="loop")
    assert [one.metrics["devices/gain"] for one in result.rounds] == [1.5, 2.5]  # w = 0, 1; parts 0 .. 3
    assert result.final["devices/gain"] == 3.5
    assert result.final["devices/gain/worst_tenth"] == 2.0


def test_a_population_without_held_out_samples_says_so() -> None:
    class Bare:
        def names(self) -> list[str]:
            return ["a", "b"]

        def samples(self, client: str) -> Samples:
            return Samples(*map(torch.from_numpy, _data("0" if client == "a" else "1")))

    result = edgefl.simulate(_task(), engine="loop", rounds=1, population=lambda _task: Bare())
    assert "give it a method eval_samples(client)" in result.rounds[0].not_evaluated["a"]
    assert not _devices(result.rounds[0].metrics)


def test_in_virtual_time_the_metrics_are_the_same() -> None:
    real = _simulated()
    virtual = _simulated(**{"population.devices.speed": {"mean": 100.0}})
    assert virtual.virtual_seconds
    assert _devices(virtual.final) == _devices(real.final)


def test_interrupted_rounds_have_no_final_evaluation() -> None:
    from edgefl.simulation.simulate import Watching

    def stop(_outcome: RoundReport) -> None:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGINT)

    result = edgefl.simulate(_task(), clients=3, rounds=3, engine="loop", watching=Watching(on_round=stop))
    assert result.interrupted
    assert not _devices(result.final)
