"""The agent: builds its parts, starts them and stops them.

    link -> participant -> trainer (child) -> outbox -> link
         -> updater -> predictions (child, which owns the port)

Everything runs in one event loop; work that blocks for more than a few milliseconds runs in a thread or in the
trainer. Each task has a name and an owner; SIGTERM and SIGINT stop them all in order.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from edge_agent.config import AgentConfig
from edge_agent.generation.supervisor import (
    GenerationCallbacks,
    GenerationPlace,
    GenerationSupervisor,
)
from edge_agent.install.notify import keep_alive, notify
from edge_agent.link.channel import CloudChannel
from edge_agent.link.chooser import ParentChooser, ParentRules
from edge_agent.link.link import CloudLink
from edge_agent.link.log_sender import LOG_FILE, LogSender
from edge_agent.link.outbox import Outbox
from edge_agent.link.parents import KnownParents, load_fleet_key, parent_name
from edge_agent.link.profile import SERVING_FILE, Profile, load_profile
from edge_agent.live import LiveFile, LiveState
from edge_agent.placement.text import placement_text
from edge_agent.policy.machine import Machine
from edge_agent.policy.rules import refuse_never_true
from edge_agent.policy.watch import PolicyWatch, refusal_text
from edge_agent.releases.host import ReleaseHost
from edge_agent.releases.model_file import ModelFile
from edge_agent.releases.updater import Updater, UpdaterDependencies
from edge_agent.resources import default_memory_limit_mb, default_serving_memory_mb
from edge_agent.serving.api import bind, url_of
from edge_agent.serving.supervisor import ServingCallbacks, ServingConfig, ServingSupervisor
from edge_agent.serving.wire import PlacementNote, TailAccess
from edge_agent.store import Store
from edge_agent.training.bundles import Bundles
from edge_agent.training.environments import Environments
from edge_agent.training.participant import Participant, ParticipantDependencies
from edge_agent.training.split.tunnel import SplitTunnel
from edge_agent.training.trainer import Trainer
from edgefl.errors import ConfigError, PartFailed
from edgefl.logs import event, logging_to
from edgefl.process.home import lock_home, replace_file
from edgefl.protocols.messages import (
    Assignment,
    JobMessage,
    LogWanted,
    ModelReport,
    RolloutNote,
    RoundClosed,
    Signed,
    UpdateRefused,
)
from edgefl.terminal.text import one_line

if TYPE_CHECKING:
    from edge_agent.serving.revoked import RevokedList

MAX_REASON_CHARS = 300

_log = logging.getLogger(__name__)


async def run_agent(config: AgentConfig) -> None:
    """Run until SIGTERM or SIGINT.

    Raises HomeError or ConfigError if it cannot start, PartFailed if one of its parts ends.
    """
    config = dataclasses.replace(config, home=config.home.absolute())  # a task has its own working folder
    profile = load_profile(config.home)
    with lock_home(config.home), logging_to(config.home / LOG_FILE):
        agent = Agent(config, profile)
        try:
            await agent.run()
        except ExceptionGroup as group:
            _log.critical("agent.part_ended", exc_info=group)
            why = "; ".join(one_line(repr(error), MAX_REASON_CHARS) for error in _leaves(group))
            raise PartFailed(f"the agent stopped because one of its parts failed: {why}. See its log") from group
        finally:
            agent.close()


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    nested = [_leaves(one) if isinstance(one, BaseExceptionGroup) else [one] for one in group.exceptions]
    return [one for several in nested for one in several]


class Agent:
    """The parts of one agent. It also handles the messages that its link receives."""

    def __init__(self, config: AgentConfig, profile: Profile) -> None:
        home = config.home
        self._config, self._profile = config, profile
        fleet_key = load_fleet_key(home)
        self._trainer = Trainer(config.trainer_socket, config.trainer_idle_s)
        self._trainer.tunnel = SplitTunnel(profile, home)
        self._policy = _policy_watch(config, self._trainer, self._on_policy)
        listener = bind(config.serve_host, config.serve_port)
        if config.serve_tls and profile.insecure:
            raise ConfigError(
                "--serve-tls needs a fleet with TLS; this device is enrolled in one without. Drop --serve-tls"
            )
        self._url = url_of(listener, secure=config.serve_tls)
        self._store = Store(home)
        rules = ParentRules(policy=config.parents, is_idle=self._is_idle)
        self._chooser = ParentChooser(home, KnownParents(home, profile, fleet_key), rules)
        self._channel = CloudChannel(self._chooser.current, home)
        self._placements: dict[str, PlacementNote] = {}  # by model
        serving_mb = config.serve_memory_mb or default_serving_memory_mb()
        self._generation = GenerationSupervisor(
            config.generation,
            GenerationPlace(
                device=profile.device, tls_home=None if profile.insecure else home, memory_mb=config.generate_memory_mb,
                load_s=config.model_load_s,
            ),
            GenerationCallbacks(address=self._on_generation, failing=self._on_failing),
        )  # fmt: skip
        self._supervisor = ServingSupervisor(
            listener,
            ServingConfig(
                memory_mb=serving_mb,
                load_s=config.model_load_s,
                token=config.access().token(),
                tls_home=str(home) if config.serve_tls else "",
                tail=TailAccess(
                    home="" if profile.insecure else str(home), device=profile.device, addresses=config.stages
                ),
                generation=self._generation.address,
            ),
            ServingCallbacks(serving=self._on_serving, failing=self._on_failing, placed=self._on_placed),
        )
        self._host = ReleaseHost(self._supervisor, self._generation)
        self._started = False
        self._moved_with: Assignment | None = None  # that ran when the parent was changed
        self._environments = Environments(home, may_install=config.install_dependencies)
        self._logs = LogSender(home, self._channel)
        self._outbox = Outbox(self._store, self._channel)
        self._revoked = self._revoked_list() if config.serve_tls else None
        on_reachable = self._revoked.refresh if self._revoked else _nothing
        self._link = CloudLink(home, self._chooser, self._channel, self, on_reachable)
        self._link.on_parent = self._note_parent
        self._outbox.on_answered = self._link.note_idle
        self._outbox.on_stale = self._link.ask
        self._link.refusals = self._policy.refusals
        self._link.models = self._model_reports
        self._live = LiveFile(home, self._live_state)
        self._participant = Participant(
            ParticipantDependencies(
                device=profile.device,
                home=home,
                options=config.data,
                memory_limit_mb=config.trainer_memory_mb or default_memory_limit_mb(),
                store=self._store,
                outbox=self._outbox,
                trainer=self._trainer,
                bundles=Bundles(home, fleet_key, self._channel),
                environments=self._environments,
                channel=self._channel,
                rendezvous=config.site_rendezvous,
                machines=config.site_machines if config.site_rendezvous else 1,
                on_change=self._note_work,
            )
        )
        self._participant.refuse(self._policy.refusals)
        self._channel.on_change = self._link.on_change = self._live.note_change
        self._updater = Updater(
            UpdaterDependencies(
                device=profile.device,
                home=home,
                fleet_key=fleet_key,
                channel=self._channel,
                host=self._host,
                report=self._report,
                changed=self._announce,
                placement=config.placement,
                serving_bytes=serving_mb << 20,
            )
        )

    async def run(self) -> None:
        """Run all parts until SIGTERM or SIGINT."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        async with asyncio.TaskGroup() as tasks:
            children = [
                tasks.create_task(work, name=name)
                for name, work in {
                    "predictions": self._supervisor.run(),
                    "restore": self._restore(),
                    "link": self._link.run(),
                    "outbox": self._outbox.run(),
                    "rounds": self._participant.run(),
                    "trainer": self._trainer.run(),
                    "environments": self._environments.run(),
                    "updater": self._updater.run(),
                    "logs": self._logs.run(),
                    "live": self._live.run(),
                    "watchdog": keep_alive(),
                    "policy": self._policy.run(),
                    **({"revoked": self._revoked.run()} if self._revoked else {}),
                    "generation": self._generation.run(),
                }.items()
            ]
            event(_log, logging.INFO, "agent.started", device=self._profile.device, pid=os.getpid(), serves=self._url,
                  parent=parent_name(self._chooser.current), cloud=self._chooser.current.grpc)  # fmt: skip
            await stop.wait()
            notify("STOPPING=1")
            for child in children:
                child.cancel()
        event(_log, logging.INFO, "agent.stopped", device=self._profile.device)

    def close(self) -> None:
        self._store.close()

    def on_job(self, message: JobMessage) -> None:
        self._participant.handle(message)
        is_asked = not isinstance(message, RoundClosed | UpdateRefused)
        if is_asked and self._outbox.is_empty() and self._store.is_answered(message.job, message.round):
            self._link.ask()  # the answer is lost, perhaps with a region: `Next` says whether it is wanted again

    def on_command(self, command: LogWanted) -> None:
        self._logs.handle(command)

    def on_desired(self, signed: Signed) -> None:
        self._updater.handle(signed)

    def before_next(self) -> tuple[list[str], Callable[[list[Assignment], list[str]], None]]:
        current, answered_until = self._participant.current, self._store.last_answered()

        def take(assignments: list[Assignment], ended: list[str]) -> None:
            self._participant.forget(ended)
            # A new parent may not have been asked yet for what this device was asked by the former one.
            before = None if current is self._moved_with else current
            self._participant.reconcile(assignments, before, answered_until)
            self._outbox.wake()

        return self._participant.jobs_with_data(), take

    def _on_serving(self, serving: bool) -> None:  # noqa: FBT001 - a callback has no names
        path = self._config.home / SERVING_FILE
        try:
            if serving:
                replace_file(path, self._url.encode())
            else:
                path.unlink(missing_ok=True)
        except OSError as error:  # a full disk: only `edgefl agent status` lacks the URL then
            event(_log, logging.WARNING, "serving.not_noted", reason=error)
        if serving and not self._started:
            self._started = True
            notify("READY=1")

    def _on_policy(self, refusals: Mapping[str, str]) -> None:
        self._participant.refuse(refusals)
        self._link.refuse(refusals)
        self._live.note_change()

    def _on_failing(self, model: ModelFile, reason: str) -> None:
        self._updater.handle_failing(model, reason)

    def _on_generation(self, address: str) -> None:
        self._supervisor.set_generation(address)

    def _on_placed(self, note: PlacementNote) -> None:
        self._placements[note.model] = note
        self._live.note_change()

    def _model_reports(self) -> dict[str, ModelReport]:
        """Return how the models that are served are placed, and what a run of each takes here."""
        served = self._host.versions()
        return {
            name: ModelReport(version=note.version, placement=placement_text(note.facts), profile_ms=note.profile_ms)
            for name, note in self._placements.items()
            if served.get(name) == note.version
        }

    async def _restore(self) -> None:
        await self._updater.restore()
        self._supervisor.set_ready()

    def _revoked_list(self) -> RevokedList:
        from edge_agent.serving.revoked import RevokedList  # lazy: loads httpx, needed with --serve-tls only

        return RevokedList(self._config.home, self._chooser.current, self._supervisor.disconnect_clients)

    def _is_idle(self) -> bool:
        return self._participant.current is None and self._outbox.may_leave()

    def _note_work(self) -> None:
        self._live.note_change()
        self._link.note_idle()

    def _note_parent(self, profile: Profile) -> None:
        self._moved_with = self._participant.current
        self._live.note_change()
        if self._revoked is not None:
            self._revoked.follow(profile)

    def _live_state(self) -> LiveState:
        current = self._participant.current
        return LiveState(
            pid=os.getpid(),
            cloud_reachable=self._channel.reachable,
            broker_fault=self._link.broker_fault,
            parent=parent_name(self._chooser.current),
            parent_since_s=self._chooser.since_s,
            training_job="" if current is None else current.job,
            training_round=0 if current is None else current.round,
            policy=self._policy.text,
            policy_refuses=refusal_text(self._policy.refusals),
            placements={name: one.placement for name, one in self._model_reports().items() if one.placement},
        )

    def _report(self, note: RolloutNote) -> None:
        self._link.report(note)

    def _announce(self) -> None:
        self._link.serve(self._host.versions(), self._url)


def _policy_watch(config: AgentConfig, trainer: Trainer, on_change: Callable[[Mapping[str, str]], None]) -> PolicyWatch:
    """Return the watch over the device's policy; raises ConfigError if the policy could never hold here."""
    policy, machine = config.device_policy(), Machine(lambda: trainer.pid)
    if policy is not None:
        metered, why = machine.metered() if "unmetered" in policy.terms else (False, "")
        if metered is None:
            refuse_never_true(policy, {"unmetered": why})
    return PolicyWatch(policy, machine, on_change)


def _nothing() -> None:
    pass
