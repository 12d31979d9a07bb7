"""`edgefl.simulate`: the rounds, rule, guards and server step of a deployed job, over simulated clients.

Only the fleet differs from production: an engine on this machine instead of devices.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgefl.aggregation import refuse_unusable
from edgefl.aggregation.schedules import of_round
from edgefl.aggregation.server_opt import ServerOptimizer
from edgefl.choosing.combined import LATE_NEXT
from edgefl.choosing.history import History
from edgefl.choosing.needs import reads_history
from edgefl.config import Config, JobConfig, config_of
from edgefl.errors import ConfigError, QuorumNotMet, StepFailed
from edgefl.measure import num_cores, own_peak_mb
from edgefl.records import RoundOutcome, RoundReport, count_clients, no_counts
from edgefl.rounds import Fleet, Job, LastEvaluation, evaluate_last, ignored, run_rounds, without_devices
from edgefl.settings.server import EXACT
from edgefl.settings.split import SPLIT
from edgefl.simulation.engines.auto import AUTO, AutoFleet, Chosen, make_engine
from edgefl.simulation.engines.client_states import open_states
from edgefl.simulation.engines.fleets import (
    ModelInForm,
    PopulationMaker,
    SimulationSetup,
    TrainingMethod,
    torch_threads,
)
from edgefl.simulation.engines.ray.fleet import RayFleet
from edgefl.simulation.selection import ClientSelection, SelectedFleet
from edgefl.simulation.study.checkpoint import (
    Checkpoint,
    Checkpoints,
    flat_settings,
    open_checkpoints,
    read_checkpoint,
    read_settings,
    refuse_another,
    refuse_other_shapes,
)
from edgefl.simulation.study.report import CutShort, SimulationResult, model_of
from edgefl.simulation.world.population import make_population
from edgefl.simulation.world.settings import (
    SimulationConfig,
    VirtualTime,
    make_selection,
    virtual_time,
    with_arguments,
)
from edgefl.simulation.world.tiers import TieredFleet, below_regions, tier_links
from edgefl.stopping import EarlyStop, make_stop
from edgefl.task import Task, load_task
from edgefl.terminal.interrupt import set_by_interrupt
from edgefl.training.adapters.exact import refuse_inexact
from edgefl.training.early_stop import with_stop_direction
from edgefl.training.evaluation import Judge
from edgefl.training.local import initial_parameters
from edgefl.training.local_evaluation import evaluation_spec
from edgefl.training.parts import parts_of
from edgefl.training.randomness import kept, seeded
from edgefl.training.samples import require_torch
from edgefl.training.steps.client_state import refuse_unkept
from edgefl.trees.frozen import whole
from edgefl.trees.scratch import in_memory

OnEngine = Callable[[str, str], None]  # its name, and why it was chosen
OnRound = Callable[[RoundReport], None]
OnState = Callable[[Checkpoint], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Watching:
    """Callbacks of a running simulation."""

    on_engine: OnEngine = field(default=lambda _name, _reason: None)
    on_round: OnRound = field(default=lambda _outcome: None)
    on_state: OnState | None = None  # called before `on_round`, with all that is needed to continue


def simulate(  # noqa: PLR0913 - one a thing to choose, all with a default
    task: Task | str | Path, *, clients: int | None = None, rounds: int | None = None, engine: str = AUTO,
    config: Config = None, set: Mapping[str, Any] | None = None,  # noqa: A002 - as the command's --set
    data: Mapping[str, str] | None = None, population: PopulationMaker | None = None,
    evaluate_every: int = 1, out: Path | None = None, watching: Watching | None = None,
    checkpoint: Path | str | None = None, checkpoint_every: int = 1, resume: Path | str | None = None,
    address: str | None = None, going_on: Checkpoint | None = None,
) -> SimulationResult:  # fmt: skip
    """Train a task over simulated clients and return the result.

    `task` is a Task, `package.module:attribute` or a folder. `config` is a configuration, a TOML file's path or a
    mapping such as {"train": {"lr": 0.1}}, which `set`, such as {"train.lr": 0.1}, overrides. The clients come from
    `population`, or from the configuration's `[population]` (a `SimulationConfig`), which `clients` and the loader's
    `data` options override.
    Ctrl-C ends the round and returns the result so far. `checkpoint` is a folder for the state after each
    `checkpoint_every`-th round; `resume` continues from such a folder, and keeps the state there;
    its settings hold if no `config` is given.
    `address` is the Ray cluster for the engine `ray`, which otherwise starts one. `going_on` is a state from
    `Watching.on_state` to continue from. User code runs in this process; the command uses a separate one.
    Raises ConfigError, TaskError, and CutShort if a round ends with too few updates, or with parameters that are
    not finite.
    """
    require_torch("simulation", "sim")
    start_s = time.perf_counter()
    watching = watching or Watching()
    if population is not None and (clients is not None or data):
        raise ConfigError("a population has its own clients and data; drop `clients` and `data`")
    folder, before = (None if one is None else Path(one) for one in (checkpoint, resume))
    if before is not None and config is None:
        config = read_settings(before)
    settings = with_arguments(config_of(SimulationConfig, config, set), clients=clients, rounds=rounds, data=data)
    refuse_unusable(settings)
    if settings.train.mode == SPLIT:
        raise ConfigError(
            f"train.mode={SPLIT!r} needs a fleet: `edgefl run`. A simulation trains whole models, with the same "
            "result; leave train.mode and train.split out"
        )
    with (
        kept(), open_checkpoints(folder, before, checkpoint_every) as checkpoints,
        open_states(of_round(settings, 1), folder, before, going_on.client_states if going_on else "") as states,
    ):  # fmt: skip
        if checkpoints is not None and settings.rounds.late == LATE_NEXT:
            raise ConfigError(
                f"rounds.late={LATE_NEXT!r} and checkpoints: a checkpoint lacks the updates that are under way. "
                "Leave one of them out"
            )
        saved = going_on or (None if before is None else read_checkpoint(before))
        setup = dataclasses.replace(_set_up(task, settings, population, saved), states=states)
        history = History() if saved is None else History.from_json(saved.history)
        selection = make_selection(setup, settings, history)
        stop_config = with_stop_direction(settings, setup.task).rounds.stop
        with set_by_interrupt(setup.stop):
            chosen = _make_engine(engine, setup, saved, address)
            with closing(chosen.engine):
                watching.on_engine(chosen.name, chosen.reason)
                tiered = below_regions(chosen.engine, settings, setup.population.names(), states)
                virtual = virtual_time(setup, settings, chosen.engine, saved, tiered, selection)
                read = history if reads_history(settings.rounds) else None
                choice = _Choice(selection, read, make_stop(stop_config), tiered)
                run = _Run(setup, chosen, virtual, watching, evaluate_every, choice)
                run.begin(start_s, checkpoints, saved)
                try:
                    run.rounds_until_stopped()
                except (QuorumNotMet, StepFailed) as error:
                    raise CutShort(str(error), run.result(out)) from error
                return run.result(out)


def _set_up(
    task: Task | str | Path, config: SimulationConfig, population_maker: PopulationMaker | None,
    saved: Checkpoint | None,
) -> SimulationSetup:  # fmt: skip
    loaded = task if isinstance(task, Task) else load_task(str(task))
    if saved is not None:
        refuse_another(saved, loaded.name, config)
    maker = population_maker or partial(make_population, config=config.population, seed=config.train.seed)
    with seeded(config.train.seed):
        population = maker(loaded)
    refuse_more_than_there_are(config, len(population.names()))
    if saved is not None:
        refuse_other_shapes(saved, initial_parameters(loaded, config.train.seed), len(population.names()))
    refuse_inexact(loaded, config)
    refuse_unkept(loaded, config.train, config.server.fragments, parts_of(loaded, config.train.seed).moving)
    reference = None if isinstance(task, Task) else str(task)
    method = TrainingMethod(compiled=config.engine.compile, recorded=config.engine.record)
    names, there = population.names(), () if saved is None else np.flatnonzero(saved.took_part)
    served = {(loaded.name, names[int(index)]) for index in there}
    return SimulationSetup(
        task=loaded, reference=reference, make_population=maker, population=population, config=config, method=method,
        served=served,
    )  # fmt: skip


def _make_engine(name: str, setup: SimulationSetup, saved: Checkpoint | None, address: str | None) -> Chosen:
    """Make the engine; `auto` continues with the checkpoint's engine, because another one rounds differently."""
    name = saved.engine if saved is not None and name == AUTO else name
    if address is None:
        chosen = make_engine(name, setup)
    elif name == "ray":
        chosen = Chosen(RayFleet(setup, address), name, f"it was asked for, on the cluster at {address}")
    else:
        raise ConfigError(
            f"the engine {name!r} has no address: it runs on this machine. Drop the address, or use 'ray'"
        )
    if saved is None:
        return chosen
    return dataclasses.replace(chosen, reason=f"resumed after round {saved.round} of {setup.config.rounds.count}")


def refuse_more_than_there_are(config: JobConfig, there: int) -> None:
    """Raise ConfigError if rounds need more clients than the population has."""
    rounds = config.rounds
    if max(rounds.clients, rounds.quorum) > there:
        raise ConfigError(
            f"rounds.clients={rounds.clients} and rounds.quorum={rounds.quorum} need more clients than the {there} "
            "of this simulation; simulate more clients, or lower these settings"
        )


@dataclass(frozen=True, slots=True)
class _Choice:
    """Who may take part, until when, and below which regions."""

    selection: ClientSelection | None
    history: History | None
    stop: EarlyStop | None
    tiered: TieredFleet | None


class _Run:
    """The finished rounds of a running simulation."""

    def __init__(
        self,
        setup: SimulationSetup,
        chosen: Chosen,
        virtual: VirtualTime | None,
        watching: Watching,
        evaluate_every: int,
        choice: _Choice,
    ) -> None:
        self._setup, self._chosen, self._virtual, self._watching = setup, chosen, virtual, watching
        self._tiered = choice.tiered
        self._evaluate_every, self._choice = evaluate_every, choice
        self._judge = Judge(
            setup.task, computing=lambda: torch_threads(num_cores()), workers=setup.config.train.workers
        )
        self._parts = parts_of(setup.task, setup.config.train.seed)
        self._parameters = self._parts.moving
        self._rounds: list[RoundReport] = []
        self._names = setup.population.names()
        self._took_part = no_counts(len(self._names))
        config, gradient = setup.config, setup.config.train.algorithm == "fedsgd"
        self._step = ServerOptimizer(config.server, gradient=gradient, buffers=self._parts.buffers)
        self._start_s = time.perf_counter()
        self._checkpoints: Checkpoints | None = None
        self._settings, self._resumed = flat_settings(config), False
        self._last = LastEvaluation()

    def begin(self, start_s: float, checkpoints: Checkpoints | None, saved: Checkpoint | None) -> None:
        """Set the start time, the folder for the state, and the state to continue from."""
        self._start_s, self._checkpoints = start_s, checkpoints
        if isinstance(self._chosen.engine, AutoFleet):
            self._chosen.engine.on_engine = self._changed
        if saved is None:
            return
        self._resumed = True
        self._start_s = start_s - saved.seconds
        self._parts = self._parts.split(saved.parameters)
        self._parameters, self._rounds = self._parts.moving, list(saved.rounds)
        self._took_part = saved.took_part
        self._step.load(saved.optimizer)

    def rounds_until_stopped(self) -> None:
        """Run the job's rounds; a round that is below its quorum after Ctrl-C is dropped."""
        config, virtual = self._setup.config, self._virtual
        first, choice = len(self._rounds) + 1, self._choice
        clock: Callable[[], float] = time.monotonic
        fleet: Fleet = self._tiered or self._chosen.engine
        if virtual is not None:
            clock, fleet = virtual.clock, virtual.fleet
        elif choice.selection is not None:
            fleet = SelectedFleet(fleet, choice.selection.meets, first)
        if config.server.wire != EXACT:
            fleet = ModelInForm(fleet, config.server.wire)
        if choice.stop is not None:
            for one in self._rounds:
                choice.stop.note(one.round, one.metrics)
        job = Job(
            id=self._setup.task.name, config=config, step=self._step, clock=clock, first_round=first,
            keep=in_memory, frozen=self._parts.frozen, evaluation=evaluation_spec(self._setup.task),
            on_refusal=ignored if virtual is None else virtual.fleet.refuse,
            history=choice.history, times_clients=virtual is not None, stop=choice.stop,
        )  # fmt: skip
        start_s = time.perf_counter()
        try:
            for outcome in run_rounds(job, fleet, self._parameters):
                self._note(outcome, time.perf_counter() - start_s)
                start_s = time.perf_counter()
                if self._setup.stop.is_set():
                    return
            self._last = evaluate_last(job, fleet, self._parameters, done=len(self._rounds))
        except QuorumNotMet:
            if not self._setup.stop.is_set():
                raise

    def result(self, out: Path | None) -> SimulationResult:
        """Return the result so far, and write the model if `out` is given and the model was trained."""
        parameters = whole(self._parameters, self._parts.frozen)
        peak_mb = own_peak_mb() + float(getattr(self._chosen.engine, "peak_rss_mb", 0.0))
        return SimulationResult(
            task=self._setup.task.name,
            engine=self._chosen.name,
            engine_reason=self._chosen.reason if self._resumed else self._reason(),
            rounds=tuple(self._rounds),
            final={**without_devices(self._rounds[-1].metrics), **self._last.metrics} if self._rounds else {},
            last_evaluation=self._last,
            seconds=time.perf_counter() - self._start_s,
            virtual_seconds=self._virtual.clock() if self._virtual is not None else None,
            round_seconds=sum(one.seconds for one in self._rounds),
            peak_rss_mb=peak_mb,
            parameters=parameters,
            model=model_of(parameters, out if self._rounds else None),
            interrupted=len(self._rounds) < self._setup.config.rounds.count and not self._stopped(),
            stopped=self._stopped(),
            took_part=self._took_part,
            tiers=tier_links(self._tiered.links) if self._tiered is not None else (),
        )

    def _note(self, outcome: RoundOutcome, seconds: float) -> None:
        self._parameters = outcome.parameters
        count_clients(self._took_part, (self._names.index(client) for client in outcome.admitted))
        last = outcome.round == self._setup.config.rounds.count or self._setup.stop.is_set()
        due = last or outcome.round % self._evaluate_every == 0
        judged = self._judge(whole(outcome.parameters, self._parts.frozen)) if due else {}
        said = dataclasses.replace(outcome.report(), seconds=seconds, metrics={**outcome.metrics, **judged})
        if self._virtual is not None:
            virtual_end_s = self._virtual.clock()
            said = dataclasses.replace(said, virtual_seconds=outcome.seconds, virtual_end_s=virtual_end_s)
        self._rounds.append(said)
        if self._choice.stop is not None:
            self._choice.stop.note(outcome.round, judged)
        written = self._keep(outcome, last=last)
        self._watching.on_round(self._rounds[-1])
        states = self._setup.states
        if states is not None and (written or self._checkpoints is None):
            states.settle(outcome.round * self._setup.config.tiers.region_rounds)

    def _stopped(self) -> str:
        """Return why the rounds ended before the last; empty if they did not."""
        is_early = len(self._rounds) < self._setup.config.rounds.count
        return self._choice.stop.reason() if is_early and self._choice.stop is not None else ""

    def _reason(self) -> str:
        """Return why the engine was chosen, with what was measured until now."""
        engine = self._chosen.engine
        return (engine.reason if isinstance(engine, AutoFleet) else "") or self._chosen.reason

    def _changed(self, name: str, reason: str) -> None:
        """Record and report which engine trains from now on."""
        self._chosen = dataclasses.replace(self._chosen, name=name, reason=reason)
        self._watching.on_engine(name, reason)

    def _keep(self, outcome: RoundOutcome, *, last: bool) -> bool:
        """Pass on and write the state; never after a round that Ctrl-C may have ended early. Say whether."""
        checkpoints, on_state = self._checkpoints, self._watching.on_state
        due = checkpoints is not None and (last or checkpoints.due(outcome.round))
        if (self._setup.stop.is_set() and outcome.missing) or not (due or on_state is not None):
            return False
        state = self._state(outcome)
        if on_state is not None:
            on_state(state)
        if checkpoints is not None and due:
            checkpoints.write(state)
        return due

    def _state(self, outcome: RoundOutcome) -> Checkpoint:
        virtual = self._virtual
        return Checkpoint(
            task=self._setup.task.name,
            engine=self._chosen.name,
            settings=self._settings,
            rounds=self._rounds,
            seconds=time.perf_counter() - self._start_s,
            virtual_s=virtual.clock() if virtual is not None else None,
            parameters=whole(outcome.parameters, self._parts.frozen),
            optimizer=self._step.state(),
            took_part=self._took_part,
            durations=virtual.fleet.durations.as_json() if virtual is not None else {},
            spent=virtual.devices.spent() if virtual is not None else np.zeros((0, 3)),
            history=self._choice.history.as_json() if self._choice.history is not None else {},
            client_states=str(self._setup.states.folder) if self._setup.states is not None else "",
        )
