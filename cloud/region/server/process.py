"""The region process: below a cloud, or another region, and above devices. Downward it serves as a cloud does; upward
it is one participant, which sends one partial sum for all of its devices.

It holds no key of the fleet: what is signed was signed at the top and is passed on unchanged.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from typing import Any

import grpc

from cloud.aggregator import keep_freed_memory, shrink_tls_buffers
from cloud.broker.builtin import BuiltinBroker
from cloud.broker.child import EMBEDDED, MosquittoChild, find_mosquitto
from cloud.broker.inbox import Inbox
from cloud.broker.link import DeviceLink, DeviceLinkCallbacks
from cloud.dataplane.fleet_service import FleetService, ServiceDependencies, handler
from cloud.dataplane.grpc_fleet import FleetDependencies
from cloud.dataplane.grpc_port import GrpcPort
from cloud.dataplane.open_rounds import OpenRounds
from cloud.http.server import serve_http
from cloud.region.children import Children, ChildrenDependencies
from cloud.region.parents import reached_at
from cloud.region.server.broker import RegionMosquitto
from cloud.region.server.enrolment import RegionProfile
from cloud.region.server.http import RegionServices, make_region_app
from cloud.region.server.loop_calls import LoopCalls
from cloud.region.server.membership import CutOff, RegionMembership
from cloud.region.server.messages import RegionMessages
from cloud.region.server.options import RegionOptions
from cloud.region.server.own_certificate import OwnCertificate
from cloud.region.server.uplink import SumFile, Uplink
from cloud.region.server.upward import Upward
from cloud.region.server.work import RegionWork, round_in
from cloud.region.service import TierDependencies, TierService, tier_handler
from cloud.servers import serve_grpc
from cloud.shares import Shares
from cloud.state.blobs import BlobStore
from cloud.state.jobs import Jobs
from cloud.state.spool import Spool
from cloud.state.storage import Storage
from cloud.state.store import open_database
from cloud.supervisor import Supervisor, database_fault, disk_fault
from cloud.trust.renewal import is_due
from cloud.trust.upkeep import Upkeep, interval_s
from edgefl.errors import CloudStopping, EnrolmentRefused, HomeError
from edgefl.logs import event, logging_to
from edgefl.process.descriptors import raise_limit
from edgefl.process.home import lock_home
from edgefl.process.version import __version__
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols import tiers
from edgefl.protocols.manifest import Bundle
from edgefl.protocols.messages import Signed, decode, decode_command
from edgefl.protocols.ports.http_limits import HttpLimits
from edgefl.protocols.tiers import Message, RegionState, Work
from edgefl.protocols.tls import LEAF_DAYS, REGION_DOMAIN, Identity, reloading, server_context

LOG_FILE = "region.log"
STATE_EVERY_S = 5.0  # how often the traffic is reported, if it has changed

_log = logging.getLogger(__name__)


class Region:
    """One region process on one home."""

    def __init__(self, options: RegionOptions, profile: RegionProfile) -> None:
        home = options.home
        self._options, self._profile = options, profile
        self._exit = contextlib.ExitStack()
        self._exit.callback(lock_home(home).close)
        self._identity = Identity.in_folder(home / "tls")
        engine = open_database(home / "region.db")
        self._exit.callback(engine.dispose)
        self.supervisor = Supervisor()
        self._program = find_mosquitto() if options.broker == EMBEDDED else None
        self._shares = Shares.of(raise_limit(), builtin_broker=self._program is None)
        self._storage = Storage(home)
        self._blobs, self._spool = BlobStore(home / "blobs"), Spool(home / "spool")
        self._rounds = OpenRounds()
        self._jobs = Jobs(engine, self._blobs, _signs_nothing)
        self.membership = RegionMembership(home, profile.name)
        self._upward = Upward()
        self._upward.on_state = self._rounds.wake
        self._link = DeviceLink(
            options.broker_here,
            self._identity,
            DeviceLinkCallbacks(
                on_failure=functools.partial(self.supervisor.report_failure, "link"),
                on_state=self._upward.note_state,
                on_lost=self._upward.note_lost,
                on_note=self._upward.note_rollout,
                on_telemetry=self._upward.note_telemetry,
                is_known=self.membership.is_device,
            ),
            name=profile.name,
            server_name=profile.name + REGION_DOMAIN,
        )  # fmt: skip
        self._exit.callback(self._link.close)
        self._children = Children(
            ChildrenDependencies(
                name=profile.name,
                rounds=self._rounds,
                members=self.membership,
                crl=self.membership.crl,
                desired_for=self.membership.desired_for,
                running=self.membership.running,
                parent_lists=self.membership.parent_lists,
                certificate_days=self.membership.certificate_days,
                heard=self._link.hear,
                told=self._upward.pass_on,
                used=self._upward.note_serial,
                is_over=self._is_over,
            )
        )
        self.membership.changed.append(self._children.refresh)
        self._link.children = self._children
        self._storage.changed = self._rounds.wake
        self._heard: Inbox[tuple[str, bytes | None, bool]] = Inbox("uplink-inbox", self._take)
        self._ends: list[Callable[[CutOff], object]] = []
        self._refusal: EnrolmentRefused | None = None  # this region does not belong to the fleet any more
        self._fleet = FleetDependencies(self._rounds, self._jobs, self._blobs, self._spool, self._link, self._storage)
        self._work = RegionWork(self._fleet, home / "sums", self._fetch, self._send_sum)
        self._work.place = (profile.name, profile.parent_name)
        self._work.on_crash = functools.partial(self.supervisor.report_failure, "rounds")
        self.supervisor.add_check("link", lambda: self._link.reason)
        self.supervisor.add_check("uplink", lambda: self._uplink.reason)
        self.supervisor.add_check("disk", lambda: self._storage.waiting() or disk_fault(home))
        self.supervisor.add_check("database", lambda: self._heard.reason or database_fault(home / "region.db"))

    def serve(self, on_ready: Callable[[str], None] = lambda _url: None) -> None:
        """Serve until SIGTERM or SIGINT; raises ConfigError for a port in use, PartFailed if a part failed."""
        keep_freed_memory()
        shrink_tls_buffers()
        with self._exit, logging_to(self._options.home / LOG_FILE):
            try:
                asyncio.run(self.run(on_ready))
            except Exception as error:
                if self.supervisor.failure is None:
                    raise
                raise self.supervisor.failure from error
        if self.supervisor.failure is not None:
            raise self.supervisor.failure

    async def run(self, on_ready: Callable[[str], None]) -> None:
        options, profile = self._options, self._profile
        stop = asyncio.Event()
        self._loop = loop = asyncio.get_running_loop()
        self._calls = LoopCalls(loop, lambda: self._rounds.stopping)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        self.supervisor.on_end = functools.partial(loop.call_soon_threadsafe, stop.set)
        self._uplink = Uplink(
            profile, self._identity, self._blobs, options.home / "downloads", self._upward.mirror,
            lambda key, value: self._heard.put(key, (key, value, self._uplink.copy.is_complete)),
        )  # fmt: skip
        self._messages = RegionMessages(self._fleet, loop, self._uplink.send)
        self._heard.start()
        broker = self._broker()
        self._ends.append(lambda cut: broker.drop(cut.device))
        self.supervisor.add_check("broker", lambda: broker.reason)
        self._own = OwnCertificate(
            options.home / "tls", profile.name, self.membership.certificate_days,
            lambda request: self._calls.wait(self._uplink.renew(request)),
        )  # fmt: skip
        url = f"https://{options.address or options.host}:{options.http_port}"
        async with broker, self._grpc_server(), self._http_server(broker), asyncio.TaskGroup() as tasks:
            self._link.start()
            running = [
                tasks.create_task(self._stay_connected(stop), name="uplink"),
                tasks.create_task(self._report(), name="region-state"),
                tasks.create_task(self._upward.run(), name="telemetry"),
            ]
            event(_log, logging.INFO, "region.ready", region=profile.name, url=url, grpc_port=options.grpc_port,
                  parent=profile.parent_grpc, home=options.home, broker=broker.program)  # fmt: skip
            on_ready(url)
            await stop.wait()
            event(_log, logging.INFO, "region.stopping", region=profile.name)
            self._rounds.interrupt(CloudStopping("the region is stopping; its rounds continue at the next start"))
            for task in running:
                task.cancel()
            self._messages.close()
            await asyncio.to_thread(self._stop)
        if self._refusal is not None:
            raise self._refusal

    async def _stay_connected(self, stop: asyncio.Event) -> None:
        try:
            await self._uplink.run()
        except EnrolmentRefused as refusal:
            self._refusal = refusal
            stop.set()

    def _stop(self) -> None:
        self._link.wake()
        self._storage.wake()
        self._link.close()
        self._heard.close()
        self._calls.cancel()
        self._work.close()

    def _grpc_server(self) -> AbstractAsyncContextManager[None]:
        options = self._options

        def handlers(port: GrpcPort, workers: ThreadPoolExecutor) -> list[grpc.GenericRpcHandler[Any, Any]]:
            service = FleetService(
                ServiceDependencies(
                    rounds=self._rounds,
                    jobs=self._jobs,
                    blobs=self._blobs,
                    spool=self._spool,
                    desired_for=self.membership.desired_for,
                    ended=lambda held: sorted(set(held) - set(self.membership.running())),
                    is_known=self._is_known,
                    parents_for=self.membership.parents_for,
                    unsure=lambda: self._uplink.reason,
                    pass_renewal=self._uplink.renew,
                    is_renewal_due=self._is_renewal_due,
                    storage=self._storage,
                    broker_url=f"mqtts://:{options.mqtt_port}",
                    admit=port.admit,
                    pace=port.pace,
                    max_transfers=self._shares.transfers,
                    is_over=self._is_over,
                    fetch=self._uplink.fetch,
                    logs=self._upward,
                ),
                workers,
            )
            self._ends.append(lambda cut: service.forget(cut.device, is_moved=cut.is_moved))
            self._ends.append(lambda cut: self._loop.call_soon_threadsafe(port.drop, cut.device))
            tier = TierService(
                TierDependencies(
                    children=self._children, callers=service.callers, calls=service.calls, rounds=self._rounds,
                    jobs=self._jobs, blobs=self._blobs, spool=self._spool, storage=self._storage,
                    is_over=self._is_over,
                    renew=lambda _region, request: self._uplink.renew(request),
                ),
                workers,
            )  # fmt: skip
            return [handler(service), tier_handler(tier)]

        return serve_grpc(options.host, options.grpc_port, self._identity, self._shares, handlers)

    def _broker(self) -> BuiltinBroker | MosquittoChild:
        options, name = self._options, self._profile.name
        if self._program is None:
            return BuiltinBroker(
                self._identity, options.host, options.mqtt_port, is_known=self._is_known, share=self._shares.devices,
                on_failure=functools.partial(self.supervisor.report_failure, "broker"), owner=name,
            )  # fmt: skip
        folder = (options.home / "broker").resolve()
        control = RegionMosquitto(folder, self._identity, self.membership.crl, self.membership.members)
        child = MosquittoChild(self._program, folder, options.host, options.mqtt_port, control, owner=name)
        control.restart = child.restart
        return child

    @contextlib.asynccontextmanager
    async def _http_server(self, broker: BuiltinBroker | MosquittoChild) -> AsyncIterator[None]:
        """Serve HTTPS, and look after this region's certificate, which all of its servers use."""
        options, profile = self._options, self._profile
        services = RegionServices(
            name=profile.name,
            parent_url=profile.parent_url,
            parent_server_name=profile.server_name,
            identity=self._identity,
            grpc_port=options.grpc_port,
            broker_url=f"mqtts://:{options.mqtt_port}",
            health=self.supervisor.reasons,
            crl=self.membership.crl,
            devices=lambda: {"known": len(self.membership.members()), "online": len(self._link.online())},
        )
        context = server_context(self._identity, client_certificates=False)
        reload = reloading(context, self._identity)

        def renew() -> None:
            try:
                self._own.renew()
            finally:
                broker.refresh()

        def take_new() -> None:
            reload()
            if self._own.take_new():
                self._uplink.reopen()

        self._upkeep = Upkeep(
            renew, take_new, lambda: interval_s(self.membership.certificate_days() or LEAF_DAYS),
            functools.partial(self.supervisor.report_failure, "certificates"),
        )  # fmt: skip
        self.supervisor.add_check("certificates", lambda: self._upkeep.reason)
        limits = HttpLimits(max_connections=self._shares.http)
        failed = functools.partial(self.supervisor.report_failure, "https")
        async with (
            serve_http(make_region_app(services), options.host, options.http_port, context, limits, failed),
            self._upkeep.running(),
        ):
            yield

    async def _report(self) -> None:
        """Tell the parent what this region is, whenever it has changed."""
        options = self._options
        while True:
            moved = self._rounds.moved()
            state = RegionState(
                version=__version__, parent=self._profile.parent_name, host=reached_at(options.address or options.host),
                grpc_port=options.grpc_port, http_port=options.http_port, mqtt_port=options.mqtt_port,
                devices_up_bytes=moved.up_bytes, devices_down_bytes=moved.down_bytes,
                parent_up_bytes=self._uplink.up_bytes, parent_down_bytes=self._uplink.down_bytes,
            )  # fmt: skip
            self._upward.mirror.set(f"region/{self._profile.name}", tiers.pack(state))
            await asyncio.sleep(STATE_EVERY_S)

    def _is_known(self, name: str, serial: str | None = None) -> bool:
        if self.membership.uses_next(name, serial):
            self._upward.note_serial(name, serial or "")
        return self.membership.is_known(name, serial)

    # What the parent says; in the inbox's thread.

    def _take(self, item: tuple[str, bytes | None, bool]) -> None:
        key, value, is_said = item
        if key.startswith("work/"):
            if value is not None or is_said:  # otherwise the parent was started again, and may not know it yet
                job, number = round_in(key)
                self._work.take(job, number, None if value is None else tiers.unpack(Work, value))
            return
        if key.startswith("deliver/"):
            if value is not None or is_said:
                relay, number = round_in(key)
                self._messages.take(relay, number, None if value is None else tiers.unpack(Message, value))
            return
        if key.startswith("command/"):
            self._take_command(key.removeprefix("command/"), value)
            return
        if (cut := self.membership.take(key, value)) is not None:
            for end in self._ends:
                end(cut)
            self._link.forget(cut.device)
            self._upward.forget(cut.device)
        self._pass_down(key, value)

    def _pass_down(self, key: str, value: bytes | None) -> None:
        """Tell devices and regions below what the parent has said."""
        kind, _, rest = key.partition("/")
        device = rest.partition("/")[0]
        if kind == "desired" and value is not None:
            for signed in self.membership.desired_for(device):
                self._link.send_desired(device, signed)
        elif kind == "parents" and value is not None:
            self._link.send_parents(device, decode(Signed, value))
        elif kind == "member" and not self.membership.has_next(device):
            self._upward.mirror.delete(f"serial/{device}")
        elif kind == "certificate-days":
            self._children.note_certificate_days()
            self._loop.call_soon_threadsafe(self._upkeep.look_now)
        elif kind == "revoked":
            self._loop.call_soon_threadsafe(self._upkeep.look_now)
        elif kind == "running":
            self._children.note_running()
            self._work.keep_only(self.membership.running())
            self._messages.keep_only(self.membership.running())

    def _is_renewal_due(self, certificate: bytes) -> bool:
        days = self.membership.certificate_days()
        return days > 0 and is_due(certificate, days, time.time())

    def _take_command(self, device: str, value: bytes | None) -> None:
        if value is None:
            self._upward.mirror.delete(f"log/{device}")
        elif self.membership.is_device(device):
            self._link.send_command(device, decode_command(value))

    def _is_over(self, job: str, number: int) -> bool:
        """Whether a round that is not open here will not be: it is over, or its job has ended."""
        ended = not self._uplink.reason and job not in self.membership.running()
        return ended or self._work.is_over(job, number) or self._messages.is_over(job, number)

    # Called in the threads of rounds.

    def _fetch(self, sha256: str) -> None:
        self._calls.wait(self._uplink.fetch(sha256))

    def _send_sum(self, one: SumFile) -> pb.UploadState:
        return self._calls.wait(self._uplink.send(one))


def _signs_nothing(_bundle: Bundle) -> Signed:
    raise HomeError("a region has no key of the fleet, and signs nothing")
