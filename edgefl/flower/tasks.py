"""edgefl tasks on Flower's engines: a ServerApp that runs our rounds over its Grid, and a ClientApp that trains.

    app = make_apps(task, config)[0]  # in server_app.py
    app = make_apps(task)[1]  # in client_app.py; Flower requires an assignment to the name `app`

It runs `edgefl.rounds.run_rounds` itself, with its rule, guards, quorum and server optimizer; the
Grid is its fleet. Replies are folded one by one as the Grid yields them. A node trains on the part in its
node config: `partition-id` and `num-partitions` become the data options `part` and `parts`.
Invariant: a refused reply changes nothing and is reported; a round below its quorum raises.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from edgefl.aggregation.server_opt import ServerOptimizer
from edgefl.config import JobConfig, TrainConfig, from_dict
from edgefl.errors import ConfigError, MissingExtra
from edgefl.records import Failure, Plan, RoundOutcome, Traffic, Update
from edgefl.rounds import Job, run_rounds
from edgefl.settings.split import SPLIT
from edgefl.task import Task
from edgefl.training.evaluation import evaluate
from edgefl.training.local import initial_parameters, train_locally
from edgefl.training.parts import parts_of

try:
    from flwr.app import ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
except ImportError as cause:
    raise MissingExtra("a task as a Flower app", "flower") from cause

from edgefl.flower.grid import streamed
from edgefl.flower.internals import NUM_PARTITIONS_KEY, PARTITION_ID_KEY
from edgefl.flower.records import message_bytes, record_of, tree_of

if TYPE_CHECKING:
    from flwr.app import MetricRecordValues

OnRound = Callable[[RoundOutcome, Mapping[str, float]], None]

PARAMETERS, UPDATE, PLAN, METRICS, WEIGHT = "parameters", "update", "plan", "metrics", "num-examples"


def make_apps(
    task: Task, config: JobConfig | None = None, *, on_round: OnRound | None = None
) -> tuple[ServerApp, ClientApp]:
    """Return a task's ServerApp and ClientApp, for any Flower engine.

    Run-config keys such as `rounds.count` override the config. The ServerApp leaves each round's metrics
    in its `context.state["round-N"]` and the model in `["parameters"]`; `on_round` is called with each outcome
    and the metrics of its model on the task's test data. The ServerApp raises QuorumNotMet.
    """
    return _server_app(task, config or JobConfig(), on_round), _client_app(task)


class GridFleet:
    """A Flower Grid as a fleet: its nodes, named by their ids, are the clients."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._traffic = Traffic()

    def clients(self) -> Sequence[str]:
        return tuple(str(node_id) for node_id in self._grid.get_node_ids())

    def collect(self, plan: Plan) -> Iterator[Update | Failure]:
        """Send the plan and yield answers as the Grid yields replies."""
        content = RecordDict({PARAMETERS: record_of(plan.parameters), PLAN: _plan_record(plan)})
        messages = [
            Message(content, int(client), MessageType.TRAIN, group_id=str(plan.round)) for client in plan.clients
        ]
        self._count(down_bytes=sum(message_bytes(message) for message in messages))
        replies = streamed(self._grid.send_and_receive(messages, timeout=plan.deadline_s))
        with closing(reply for reply in replies) as arriving:
            for reply in arriving:
                self._count(up_bytes=message_bytes(reply))
                yield _answer(plan, reply)

    def traffic(self) -> Traffic:
        return self._traffic

    def _count(self, *, up_bytes: int = 0, down_bytes: int = 0) -> None:
        self._traffic += Traffic(up_bytes=up_bytes, down_bytes=down_bytes)


def _server_app(task: Task, config: JobConfig, on_round: OnRound | None) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        chosen = _overridden(config, context.run_config)
        if chosen.train.mode == SPLIT:
            raise ConfigError(
                f"train.mode={SPLIT!r} needs edgefl's agents: `edgefl run`. Nodes of Flower train whole models"
            )
        parts = parts_of(task, chosen.train.seed)
        parameters = initial_parameters(task, chosen.train.seed)  # all of them are sent: a node keeps nothing
        gradient = chosen.train.algorithm == "fedsgd"
        step = ServerOptimizer(chosen.server, gradient=gradient, buffers=parts.buffers, frozen=parts.frozen)
        job = Job(id=f"{task.name}-{context.run_id}", config=chosen, step=step)
        for outcome in run_rounds(job, GridFleet(grid), parameters):
            metrics = {**outcome.metrics, **evaluate(task, outcome.parameters)}
            context.state[f"round-{outcome.round}"] = _metric_record(metrics)
            context.state[PARAMETERS] = record_of(outcome.parameters)
            if on_round is not None:
                on_round(outcome, metrics)

    return app


def _client_app(task: Task) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        plan = dict(message.content.config_records[PLAN])
        parameters = tree_of(message.content.array_records[PARAMETERS])
        fields = {key.removeprefix("train."): value for key, value in plan.items() if key.startswith("train.")}
        result = train_locally(
            task,
            parameters,
            from_dict(TrainConfig, fields),
            options=data_options(context.node_config),
            round=_whole(plan["server-round"]),
            client=client_name(context),
        )
        metrics = _metric_record({**result.metrics, WEIGHT: result.weight})
        return Message(RecordDict({UPDATE: record_of(result.tree), METRICS: metrics}), reply_to=message)

    return app


def data_options(node_config: Mapping[str, Any]) -> dict[str, str]:
    """Return the data options in a node config; its other keys become options with the same names."""
    names = {PARTITION_ID_KEY: "part", NUM_PARTITIONS_KEY: "parts"}
    return {names.get(key, key): str(value) for key, value in node_config.items()}


def client_name(context: Context) -> str:
    """Return the name that seeds a client's training: its partition, else its node id, which differs in each run."""
    part = context.node_config.get(PARTITION_ID_KEY)
    return str(context.node_id) if part is None else f"client-{part}"


def _plan_record(plan: Plan) -> ConfigRecord:
    train = {
        f"train.{key}": value
        for key, value in dataclasses.asdict(plan.train).items()
        if value != [] and key != "split"  # of a mode that is refused here
    }
    return ConfigRecord({"job": plan.job, "server-round": plan.round, **train})


def _answer(plan: Plan, reply: Message) -> Update | Failure:
    """Read a reply; an incomplete one is a failure of its node, wrong values are left to the guard."""
    device = str(reply.metadata.src_node_id)
    if reply.has_error():
        return Failure(job=plan.job, round=plan.round, device=device, reason=reply.error.reason or "an error")
    arrays, metrics = reply.content.array_records.get(UPDATE), reply.content.metric_records.get(METRICS)
    weight = None if metrics is None else metrics.get(WEIGHT)
    if arrays is None or metrics is None or not isinstance(weight, (int, float)):
        reason = f"the reply holds {sorted(reply.content)}, not {UPDATE!r} and {METRICS!r} with {WEIGHT!r}"
        return Failure(job=plan.job, round=plan.round, device=device, reason=reason)
    return Update(
        job=plan.job,
        round=plan.round,
        device=device,
        tree=tree_of(arrays),
        weight=float(weight),
        metrics={k: float(v) for k, v in metrics.items() if k != WEIGHT and not isinstance(v, list)},
    )


def _overridden(config: JobConfig, run_config: Mapping[str, Any]) -> JobConfig:
    """Return the config, overridden by the run config's `section.key` values; other keys belong to the app."""
    table = dataclasses.asdict(config)
    for key, value in run_config.items():
        section, dot, name = key.partition(".")
        if dot and section in table:
            *outer, last = name.split(".")
            place = table[section]
            for step in outer:
                place = place.setdefault(step, {})
            place[last] = value
    return from_dict(JobConfig, table)


def _metric_record(metrics: Mapping[str, float]) -> MetricRecord:
    values: dict[str, MetricRecordValues] = {name: float(value) for name, value in metrics.items()}
    return MetricRecord(values)


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0
