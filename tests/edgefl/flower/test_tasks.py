"""A task of ours through Flower's ServerApp and ClientApp is the same federation as our own rounds."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from edgefl.aggregation.server_opt import ServerOptimizer
from edgefl.config import JobConfig, from_dict
from edgefl.errors import ConfigError, QuorumNotMet, TaskError
from edgefl.flower import FlowerApp, make_apps, run_flower_app
from edgefl.flower.tasks import client_name, data_options
from edgefl.records import Update
from edgefl.rounds import Job, run_rounds
from edgefl.task import FitResult, Task
from edgefl.testing import ScriptedFleet
from edgefl.training.local import initial_parameters, train_locally

torch = pytest.importorskip("torch")
PARTS = 3


def load_part(part="0", parts="1"):
    rng = np.random.default_rng([int(part), int(parts)])
    inputs = rng.normal(size=(20 + int(part), 4)).astype(np.float32)
    return inputs, (inputs.sum(1) > 0).astype(np.int64)


def make_task(**changes):
    given = {
        "name": "line",
        "model": lambda: torch.nn.Linear(4, 2),
        "loss": torch.nn.functional.cross_entropy,
        "train_data": load_part,
        "test_data": load_part,
        "metrics": {"accuracy": lambda outputs, targets: (outputs.argmax(1) == targets).float().mean().item()},
    }
    return Task(**given | changes)


def config(**sections):
    return from_dict(
        JobConfig, {"rounds": {"count": 3, "quorum": 2}, "train": {"epochs": 2, "batch_size": 4}} | sections
    )


def through_flower(task, job_config, client_app=None, run_config=None):
    outcomes = []
    server_app, own = make_apps(task, job_config, on_round=lambda outcome, metrics: outcomes.append((outcome, metrics)))
    app = FlowerApp(
        name=task.name,
        folder=Path(),
        server_app=server_app,
        client_app=client_app or own,
        config=run_config or {},
        num_supernodes=PARTS,
    )
    return outcomes, run_flower_app(app, workers=0)  # its folder cannot be loaded in a worker


def by_our_rounds(task, job_config):
    def client(part):
        def answer(plan):
            options = {"part": str(part), "parts": str(PARTS)}
            result = train_locally(
                task, plan.parameters, plan.train, options=options, round=plan.round, client=f"client-{part}"
            )
            return Update(
                job="j",
                round=plan.round,
                device=str(part),
                tree=result.tree,
                weight=result.weight,
                metrics=result.metrics,
            )

        return answer

    step = ServerOptimizer(job_config.server, gradient=job_config.train.algorithm == "fedsgd")
    fleet = ScriptedFleet({str(part): client(part) for part in range(PARTS)})
    return list(run_rounds(Job(id="j", config=job_config, step=step), fleet, initial_parameters(task)))


def test_an_app_made_in_memory_trains_in_this_process_however_slow_it_is():
    server_app, client_app = make_apps(make_task(), config(rounds={"count": 3, "deadline_s": 86400}))
    app = FlowerApp(
        name="line", folder=Path(), server_app=server_app, client_app=client_app, config={}, num_supernodes=PARTS
    )
    slow = itertools.count(0, 10)
    result = run_flower_app(app, clock=lambda: float(next(slow)))  # so slow that one of a folder gets workers
    assert (result.num_workers, [one.admitted for one in result.rounds]) == (0, [PARTS] * 3)
    with pytest.raises(ConfigError, match="'line' was made in memory, with no folder from which 2 worker processes"):
        run_flower_app(app, workers=2)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"train": {"algorithm": "fedsgd"}, "server": {"optimizer": "Adam", "lr": 0.01}},
        {"train": {"proximal_mu": 0.1}},
    ],
    ids=["fedavg", "fedsgd", "fedprox"],
)
def test_it_equals_our_own_rounds(sections):
    task, chosen = make_task(), config(**sections)
    outcomes, result = through_flower(task, chosen)
    own = by_our_rounds(task, chosen)
    assert len(outcomes) == len(own) == 3
    for (outcome, _), mine in zip(outcomes, own, strict=True):
        assert len(outcome.admitted) == PARTS
        assert outcome.weight == mine.weight
        assert outcome.metrics == pytest.approx(mine.metrics, rel=1e-6)
        for name, array in mine.parameters.items():
            np.testing.assert_allclose(outcome.parameters[name], array, atol=1e-6)
    assert dict(result.state["round-3"]) == outcomes[-1][1]
    assert "accuracy" in result.state["round-3"]
    kept = result.state["parameters"]
    np.testing.assert_array_equal(kept["weight"].numpy(), outcomes[-1][0].parameters["weight"])
    assert outcomes[0][0].down_bytes > outcomes[0][0].up_bytes > 0


def test_a_task_with_its_own_fit():
    def fit(tree, _config, options):
        return FitResult(tree={"w": np.full(1, 1.0 + int(options["part"]))}, weight=1 + int(options["part"]))

    task = Task(name="fit", initial=lambda: {"w": np.zeros(1)}, fit=fit)
    outcomes, _ = through_flower(task, config())
    assert outcomes[-1][0].parameters["w"] == pytest.approx(3 * (1 + 4 + 9) / 6)


def test_run_config_overrides_the_jobs_config():
    outcomes, _ = through_flower(make_task(), config(), run_config={"rounds.count": 1, "train.lr": 0.5, "their-own": 3})
    assert len(outcomes) == 1
    with pytest.raises(TaskError, match=r"rounds\.number"):
        through_flower(make_task(), config(), run_config={"rounds.number": 1})


def test_split_training_is_refused():
    settings = {"train.mode": "split", "train.split.cut": "a", "train.split.server": "h:1"}
    with pytest.raises(TaskError, match="Nodes of Flower train whole models"):
        through_flower(make_task(), config(), run_config=settings)


def spoilt(task, spoil):
    """Return the task's ClientApp, whose partition 1 has its reply spoilt."""
    _, inner = make_apps(task)
    app = ClientApp()

    @app.train()
    def train(message, context):
        reply = inner(message, context)
        return spoil(message, reply) if context.node_config["partition-id"] == 1 else reply

    return app


def nan(_, reply):
    reply.content["update"] = ArrayRecord(
        {"weight": _array(np.full((2, 4), np.nan, np.float32)), "bias": reply.content["update"]["bias"]}
    )
    return reply


def _array(values):
    return ArrayRecord([values])["0"]


def weightless(_, reply):
    reply.content["metrics"]["num-examples"] = 0.0
    return reply


def empty(message, _):
    return Message(RecordDict({"metrics": MetricRecord({"x": 1.0})}), reply_to=message)


def raising(_, reply):
    raise ValueError("no paint")


@pytest.mark.parametrize(
    ("spoil", "where", "said"),
    [
        (nan, "rejected", "tensor 'weight' holds NaN"),
        (weightless, "rejected", "weight 0.0 must be"),
        (empty, "failed", "the reply holds ['metrics']"),
        (raising, "failed", "ValueError: no paint"),
    ],
)
def test_a_bad_reply_changes_nothing_and_is_reported(spoil, where, said):
    task = make_task()
    outcomes, _ = through_flower(task, config(rounds={"count": 1}), spoilt(task, spoil))
    outcome = outcomes[0][0]
    assert len(outcome.admitted) == 2
    ((_, reason),) = getattr(outcome, where).items()
    assert said in reason
    assert outcome.weight == 20 + 22
    assert all(np.isfinite(array).all() for array in outcome.parameters.values())


def test_a_round_under_its_quorum_raises():
    task = make_task()
    with pytest.raises(TaskError, match=r"QuorumNotMet.*2 of 3 updates admitted, the quorum is 3.*NaN") as raised:
        through_flower(task, config(rounds={"quorum": 3}), spoilt(task, nan))
    assert isinstance(raised.value.__cause__, QuorumNotMet)


def test_over_selected_clients_are_let_go():
    outcomes, _ = through_flower(make_task(), config(rounds={"count": 1, "clients": 2, "over_selection": 0.5}))
    assert (len(outcomes[0][0].admitted), len(outcomes[0][0].missing)) == (2, 1)


def test_nodes_are_named_by_their_partition_where_they_have_one():
    def context(**node_config):
        return Context(run_id=1, node_id=77, node_config=node_config, state=RecordDict(), run_config={})

    assert client_name(context()) == "77"
    assert client_name(context(**{"partition-id": 4})) == "client-4"
    assert data_options({"partition-id": 1, "num-partitions": 3, "skew": 0.5}) == {
        "part": "1",
        "parts": "3",
        "skew": "0.5",
    }


def test_a_wrong_optimizer_is_refused_at_start():
    with pytest.raises(TaskError) as raised:
        through_flower(make_task(), config(server={"optimizer": "Nothing"}))
    assert isinstance(raised.value.__cause__, ConfigError)
