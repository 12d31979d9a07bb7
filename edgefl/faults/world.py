"""One simulation: starts the real programs as nodes, lets the faults of a plan happen, writes down what was seen."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import shutil
import sqlite3
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy.exc import DBAPIError

from cloud.aggregator import Aggregator
from cloud.broker.child import BUILTIN
from cloud.region.server.enrolment import load_profile as load_region
from cloud.region.server.options import RegionOptions
from cloud.region.server.process import Region
from cloud.state.storage import waits_for
from edge_agent.agent import Agent
from edge_agent.config import AgentConfig
from edge_agent.link.lease import LeasePolicy
from edge_agent.link.parents import KnownParents, load_fleet_key, parent_name
from edge_agent.link.profile import load_profile
from edgefl.config import JobConfig, from_dict
from edgefl.faults.fleet import CLOUD, HOST, bundle, cloud_options, first_parameters
from edgefl.faults.machine.disk import copy_home, damage_parts
from edgefl.faults.machine.kernel import Kernel, Killed, Node
from edgefl.faults.machine.network import Network
from edgefl.faults.machine.threads import SimExecutor
from edgefl.faults.plan import DEADLINE_S, Fault, Settings
from edgefl.faults.trainer import SimTrainer
from edgefl.protocols import fleet_pb2 as pb
from edgefl.records import RoundOutcome
from edgefl.trees import SpooledTree

LIMIT_S = 1500.0  # a run that is not over then works for ever
LEAVE_S = 3.0  # a region goes for long so much later than its devices are given another parent
LONG = frozenset({"gone", "apart"})  # faults that outlast what a fleet waits for
SETTLE_S = 45.0  # after the job's end, until every device has asked and knows
POLL_S = 0.5
KEY = "simulated"
UNTOLD = frozenset({"update", "base_values"})  # numbers, which the trace need not have
_STORED = pb.UploadState.STORED


class Commits:
    """Counts a node's commits, and kills it at the one that a fault names."""

    def __init__(self, kill: Callable[[Fault], None]) -> None:
        self._kill = kill
        self.faults: list[list[Any]] = []  # [commits left, fault]

    def before(self) -> None:
        self._look("kill-before-commit")

    def after(self) -> None:
        self._look("kill-after-commit")

    def _look(self, kind: str) -> None:
        for waiting in [one for one in self.faults if one[1].kind == kind]:
            waiting[0] -= 1
            if waiting[0] == 0:
                self.faults.remove(waiting)
                self._kill(waiting[1])
                raise Killed


class World(logging.Handler):
    """The nodes of one run and its log."""

    def __init__(self, settings: Settings, template: Path, folder: Path, *, traced: bool = False) -> None:
        super().__init__(logging.DEBUG if traced else logging.INFO)
        self.settings, self.folder = settings, folder
        self.kernel = Kernel(settings.seed)
        self.network = Network(self.kernel)
        self.kernel.on_problem = self._problem
        self.network.on_reply = self._note_reply
        self.log: list[dict[str, Any]] = []  # for the auditor
        self.trace: list[str] = []
        self.counts: Counter[str] = Counter()
        self._homes: dict[str, Path] = {}
        self._starts: Counter[str] = Counter()
        self.nodes: dict[str, Node] = {}
        self._job = ""
        self._cloud_home: Any = None
        self.ended_s: float | None = None
        self._apart: list[Fault] = []  # that wait for their device's update
        self.last_fault_s = self.last_short_fault_s = 0.0  # the short ones: all but a region that is away for long
        for name in (*settings.fleet.servers, *settings.fleet.devices):
            self._homes[name] = folder / f"{name}.0"
            copy_home(template / name, self._homes[name])

    # The run.

    def run(self) -> bool:
        """Run to the end; False if there is none before the limit."""
        chance = self.kernel.order
        for name in self._homes:
            self.kernel.call_at(chance.random() * 0.5, lambda name=name: self.start(name))  # type: ignore[misc]
        for fault in self.settings.faults:
            self.kernel.call_at(fault.at_s, lambda fault=fault: self.happen(fault))  # type: ignore[misc]
        self.kernel.call_at(POLL_S, self._poll)
        is_over = self.kernel.run(lambda: self.ended_s is not None, LIMIT_S)
        if is_over and self.ended_s is not None:
            self.kernel.run(lambda: False, self.ended_s + SETTLE_S)
        return is_over

    def start(self, name: str) -> None:
        """Start a node's program on its home."""
        if name in self.nodes:
            return
        self._starts[name] += 1
        node = Node(self.kernel, name, self._homes[name])
        node.commits = Commits(lambda fault: self.kill(node, fault))  # type: ignore[attr-defined]
        self.nodes[name] = node
        node.loop.executor = SimExecutor(thread_name_prefix="asyncio")
        self.say(f"start {name}")
        self.kernel.call_in(node, lambda: node.loop.create_task(self._program(node), name=f"main-{name}"))

    async def _program(self, node: Node) -> None:
        fleet = self.settings.fleet
        try:
            if node.name == CLOUD:
                await self._cloud(node)
            elif node.name in fleet.regions:
                grpc_port, http_port, mqtt_port = fleet.ports(node.name)
                options = RegionOptions(
                    home=node.home,
                    host=HOST,
                    grpc_port=grpc_port,
                    http_port=http_port,
                    mqtt_port=mqtt_port,
                    broker=BUILTIN,
                )
                await Region(options, load_region(node.home)).run(lambda _url: None)
            else:
                config = AgentConfig(home=node.home, parents=LeasePolicy(lease_s=10.0))
                await Agent(config, load_profile(node.home)).run()
        except Exception as error:  # noqa: BLE001 - reported
            self.kernel.report(f"the program of {node.name} ended: {error!r}", error)
        else:
            self.kernel.report(f"the program of {node.name} ended")

    async def _cloud(self, node: Node) -> None:
        aggregator = Aggregator(cloud_options(self.settings.fleet, node.home))
        with aggregator.home as home:
            self._cloud_home = home
            ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            serving = asyncio.get_running_loop().create_task(aggregator.run(lambda _url: ready.set_result(None)))
            await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
            self._job = await asyncio.to_thread(self._submit, home)
            await serving

    def _submit(self, home: Any) -> str:
        """Submit the job as an operator does who repeats the request until it is answered."""
        one = self.settings
        config = from_dict(JobConfig, {
            "rounds": {
                "count": one.rounds, "quorum": one.quorum, "deadline_s": DEADLINE_S, "grace": one.grace,
                "offline_grace_s": one.offline_grace_s, "wait_s": DEADLINE_S,
            },
            "train": {"algorithm": one.algorithm}, "server": {"lr": one.server_lr},
            "tiers": {"region_rounds": one.region_rounds},
        })  # fmt: skip
        blobs = home.blobs
        return str(
            home.jobs.submit("task:task", blobs.put(bundle()), blobs.put_tree(first_parameters()), (), config, KEY)
        )

    def _poll(self) -> None:
        """Look into the cloud's database whether the job has ended."""
        if self._job and self.ended_s is None:
            with sqlite3.connect(self._homes[CLOUD] / "cloud.db") as db:
                row = db.execute("SELECT state FROM jobs WHERE id = ?", (self._job,)).fetchone()
            db.close()
            if row is not None and row[0] not in {"running", "paused"}:
                self.ended_s = self.kernel.now_s
                self.say(f"the job is {row[0]}")
        self.kernel.call_at(self.kernel.now_s + POLL_S, self._poll)

    # Faults.

    def happen(self, fault: Fault) -> None:
        """Let a fault begin."""
        if self.ended_s is not None:
            return
        node, now_s = self.nodes.get(fault.node), self.kernel.now_s
        self.say(f"fault {fault.kind} {fault.node} {fault.other} {fault.for_s:g} s")
        self.counts[fault.kind] += 1
        self.last_fault_s = max(self.last_fault_s, now_s + abs(fault.for_s))
        if fault.kind not in LONG:
            self.last_short_fault_s = max(self.last_short_fault_s, now_s + abs(fault.for_s))
        if fault.kind == "cut":
            self.network.cut(fault.node, fault.other, now_s + fault.for_s)
        elif fault.kind == "break":
            self.network.break_link(fault.node, fault.other)
        elif fault.kind == "assign":
            self._assign(fault.node, fault.other.split(","))
        elif fault.kind == "gone":
            self._go(fault)
        elif fault.kind == "apart":
            self._assign(fault.other, [fault.node, CLOUD])
            self._apart.append(fault)
        elif node is not None:
            self._befall(node, fault)

    def _befall(self, node: Node, fault: Fault) -> None:
        """Let a fault of one node begin."""
        if fault.kind == "full":
            node.disk_full_until_s = self.kernel.now_s + fault.for_s
        elif fault.kind in {"kill", "power"}:
            self.kill(node, fault)
        elif fault.kind == "pause":
            node.paused_until_s = self.kernel.now_s + fault.for_s
        elif fault.kind == "clock":
            node.wall_offset_s = fault.for_s
        else:
            node.commits.faults.append([fault.number, fault])  # type: ignore[attr-defined]

    def _go(self, fault: Fault) -> None:
        """Give the devices of a region another parent, and kill it for long a little later."""

        def leave() -> None:
            if self.ended_s is None and (node := self.nodes.get(fault.node)) is not None:
                self.kill(node, fault)

        for device in [one for one, parent in self.settings.fleet.devices.items() if parent == fault.node]:
            self._assign(device, [fault.node, CLOUD])
        self.kernel.call_at(self.kernel.now_s + LEAVE_S, leave)

    def _part(self, fault: Fault) -> None:
        """Cut a region off from its parent, and from a device whose acknowledgement is on its way."""
        until_s = self.kernel.now_s + fault.for_s
        self.last_fault_s = max(self.last_fault_s, until_s)
        self.network.cut(fault.other, fault.node, until_s)
        self.network.cut(fault.node, self.settings.fleet.regions[fault.node], until_s)

    def _assign(self, device: str, parents: Sequence[str]) -> None:
        """Give a device other parents, as `edgefl devices assign` does."""
        node, home = self.nodes.get(CLOUD), self._cloud_home
        if node is not None and home is not None:

            def assign() -> None:
                try:
                    home.members.assign(device, list(parents))
                    self.note({"kind": "assigned", "device": device, "parents": list(parents)})
                except (OSError, DBAPIError) as error:
                    if not waits_for(error):
                        raise
                    self.say(f"the operator is told that the cloud waits for {waits_for(error)}")

            node.spawn(assign, "assign")

    def kill(self, node: Node, fault: Fault) -> None:
        """Kill a node now, and start it again after the fault's time."""
        name = node.name
        if not node.is_alive:
            return
        self.say(f"killed {name}")
        self.last_fault_s = max(self.last_fault_s, self.kernel.now_s + fault.for_s)
        if fault.kind not in LONG:
            self.last_short_fault_s = max(self.last_short_fault_s, self.kernel.now_s + fault.for_s)
        self.network.end_of(node, unnoticed=fault.kind == "power")
        self.kernel.kill(node)
        del self.nodes[name]
        if name == CLOUD:
            self._cloud_home = None
        home = self.folder / f"{name}.{self._starts[name]}"
        copy_home(self._homes[name], home)
        if fault.kind == "power":
            damage_parts(home, self.network.random)
        self._homes[name] = home
        self.kernel.call_at(self.kernel.now_s + fault.for_s, lambda: self.start(name))

    # What is seen.

    def trainer(self, *_: object) -> SimTrainer:
        """Make the trainer of the device that starts."""
        return SimTrainer(self.note, tells_base=self.settings.region_rounds > 1)

    def outcome(self, outcome: RoundOutcome) -> None:
        """Note who contributed to a round; it may be computed again after a kill, and then be another."""
        path = outcome.parameters.path if isinstance(outcome.parameters, SpooledTree) else Path("none")
        self.note({
            "kind": "outcome", "job": outcome.job, "round": outcome.round, "model": path.name,
            "admitted": sorted(outcome.admitted), "rejected": dict(outcome.rejected), "failed": dict(outcome.failed),
            "missing": sorted(outcome.missing), "weight": outcome.weight,
        })  # fmt: skip

    def note(self, entry: dict[str, Any]) -> None:
        """Add an entry to the auditor's log."""
        self.log.append({"at_s": round(self.kernel.now_s, 6), **entry})
        self.say(" ".join(f"{key}={value}" for key, value in entry.items() if key not in UNTOLD))

    def say(self, text: str) -> None:
        """Add a line to the trace."""
        self.trace.append(f"{self.kernel.now_s:10.4f} {text}")

    def _note_reply(self, server: str, client: str, path: str, first: bytes, reply: Any) -> None:
        if path == "/edgefl.v1.Fleet/Upload" and reply.status == _STORED:
            key = pb.UploadChunk.FromString(first).header.key
            self.note({"kind": "acknowledged", "by": server, "device": client, "job": key.job, "round": key.round})
            for fault in [one for one in self._apart if (one.node, one.other) == (server, client)]:
                self._apart.remove(fault)
                self._part(fault)

    def _problem(self, text: str, error: BaseException | None) -> None:
        self.say(f"PROBLEM {text}")
        if error is not None and error.__traceback__ is not None:
            lines = traceback.format_exception(error)
            self.trace.extend("    " + line for one in lines for line in one.rstrip().splitlines())

    def emit(self, record: logging.LogRecord) -> None:
        """Add a line of a program's log to the trace."""
        node = self.kernel.node
        if node is not None and node.is_alive:
            text = record.getMessage().replace(str(self.folder), "~").replace(f"pid={os.getpid()}", "pid=-")
            self.say(f"{node.name}: {text}")
            if record.exc_info:
                error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
                if error is not None and record.levelno >= logging.CRITICAL:
                    self.kernel.report(f"{node.name} logged {text}", error)

    def result(self) -> dict[str, Any]:
        """Return what the cloud says of the job, and the models, read from its files alone."""
        home = self._homes[CLOUD]
        db = sqlite3.connect(home / "cloud.db")
        try:
            job = db.execute("SELECT id, state, error, rounds_done FROM jobs").fetchone()
            rows = db.execute("SELECT round, cohort, outcome FROM rounds ORDER BY round").fetchall()
        finally:
            db.close()
        outcomes = [json.loads(outcome) | {"cohort": json.loads(cohort)} for _, cohort, outcome in rows if outcome]
        models = {one["model"]: (home / "blobs" / one["model"]).read_bytes() for one in outcomes}
        return {"job": dict(zip(("id", "state", "error", "rounds_done"), job or ("", "none", "", 0), strict=True)),
                "outcomes": outcomes, "models": models}  # fmt: skip

    def reaches(self) -> set[str]:
        """Return the devices that know a parent that is there, and none that is there but cut off from the cloud."""
        away = {one.node for one in self.settings.faults if one.kind in LONG}
        regions = self.settings.fleet.regions

        def is_there(server: str) -> bool:
            return server == CLOUD or (server not in away and is_there(regions[server]))

        found = set()
        for device in self.settings.fleet.devices:
            home = self._homes[device]
            known = {parent_name(one) for one in KnownParents(home, load_profile(home), load_fleet_key(home)).profiles}
            if self.settings.region_rounds > 1:
                known = {one for one in known if one != CLOUD}  # these rounds are regions'
            if any(map(is_there, known)) and all(is_there(one) or one in away for one in known):
                found.add(device)
        return found

    def digest(self) -> str:
        """Return a hash of the trace."""
        return hashlib.sha256("\n".join(self.trace).encode()).hexdigest()

    def end(self) -> None:
        """Unwind the nodes and delete their homes."""
        self.kernel.close()
        shutil.rmtree(self.folder, ignore_errors=True)
