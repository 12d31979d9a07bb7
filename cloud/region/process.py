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
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc

from cloud.aggregator import keep_freed_memory, shrink_tls_buffers
from cloud.broker.builtin import BuiltinBroker
from cloud.broker.inbox import Inbox
from cloud.broker.link import DeviceLink, DeviceLinkCallbacks
from cloud.dataplane.fleet_service import FleetService, ServiceDependencies, handler
from cloud.dataplane.grpc_fleet import FleetDependencies
from cloud.dataplane.grpc_port import GrpcPort
from cloud.dataplane.open_rounds import OpenRounds
from cloud.http.server import serve_http
from cloud.region.children import Children, ChildrenDependencies
from cloud.region.enrolment import RegionProfile
from cloud.region.http import RegionServices, make_region_app
from cloud.region.membership import RegionMembership
from cloud.region.parents import reached_at
from cloud.region.service import TierDependencies, TierService, tier_handler
from cloud.region.uplink import SumFile, Uplink
from cloud.region.work import RegionWork
from cloud.servers import serve_grpc
from cloud.shares import Shares
from cloud.state.blobs import BlobStore
from cloud.state.jobs import Jobs
from cloud.state.spool import Spool
from cloud.state.storage import Storage
from cloud.state.store import open_database
from cloud.supervisor import Supervisor, database_fault, disk_fault
from cloud.trust.renewal import is_due
from edgefl.errors import CloudStopping, HomeError, ProtocolError
from edgefl.logs import event, logging_to
from edgefl.process.descriptors import raise_limit
from edgefl.process.home import lock_home
from edgefl.process.log_tail import MAX_BYTES
from edgefl.process.version import __version__
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols import tiers
from edgefl.protocols.manifest import Bundle
from edgefl.protocols.messages import DeviceState, RolloutNote, Signed, decode, decode_command, encode
from edgefl.protocols.ports.http_limits import HttpLimits
from edgefl.protocols.tiers import LogSent, RegionState, Work
from edgefl.protocols.tls import REGION_DOMAIN, Identity, server_context

LOG_FILE = "region.log"
STATE_EVERY_S = 5.0  # how often the traffic is reported, if it has changed

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionOptions:
    """The options of `edgefl region start`."""

    home: Path
    host: str = "127.0.0.1"
    address: str = ""  # at which devices reach it; empty = `host`
    grpc_port: int = 9440
    http_port: int = 9480
    mqtt_port: int = 8883


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
        self._shares = Shares.of(raise_limit(), builtin_broker=True)
        self._storage = Storage(home)
        self._blobs, self._spool = BlobStore(home / "blobs"), Spool(home / "spool")
        self._rounds = OpenRounds()
        self._jobs = Jobs(engine, self._blobs, _signs_nothing)
        self.membership = RegionMembership(home, profile.name)
        self._link = DeviceLink(
            f"mqtts://127.0.0.1:{options.mqtt_port}" if options.host in {"0.0.0.0", "127.0.0.1"}  # noqa: S104 - not bound
            else f"mqtts://{options.host}:{options.mqtt_port}",
            self._identity,
            DeviceLinkCallbacks(
                on_failure=functools.partial(self.supervisor.report_failure, "link"),
                on_state=self._note_state,
                on_note=self._note_rollout,
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
                told=self._pass_on,
                used=self._note_serial,
            )
        )
        self.membership.changed.append(self._children.refresh)
        self._link.children = self._children
        self._storage.changed = self._rounds.wake
        self._heard: Inbox[tuple[str, bytes | None, bool]] = Inbox("uplink-inbox", self._take)
        self._calls: set[Future[Any]] = set()  # of the rounds' threads, in the event loop
        self._cut: list[Callable[[str], object]] = []
        self._work = RegionWork(
            FleetDependencies(self._rounds, self._jobs, self._blobs, self._spool, self._link, self._storage),
            home / "sums", self._fetch, self._send_sum,
        )  # fmt: skip
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
                asyncio.run(self._serve(on_ready))
            except Exception as error:
                if self.supervisor.failure is None:
                    raise
                raise self.supervisor.failure from error
        if self.supervisor.failure is not None:
            raise self.supervisor.failure

    async def _serve(self, on_ready: Callable[[str], None]) -> None:
        options, profile = self._options, self._profile
        stop = asyncio.Event()
        self._loop = loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        self.supervisor.on_end = functools.partial(loop.call_soon_threadsafe, stop.set)
        self._uplink = Uplink(
            profile.parent_grpc, profile.server_name, self._identity, self._blobs, options.home / "downloads",
            lambda key, value: self._heard.put(key, (key, value, self._uplink.copy.is_complete)),
        )  # fmt: skip
        self._heard.start()
        broker = BuiltinBroker(
            self._identity, options.host, options.mqtt_port, is_known=self._is_known,
            share=self._shares.devices, on_failure=functools.partial(self.supervisor.report_failure, "broker"),
            owner=profile.name,
        )  # fmt: skip
        self._cut.append(broker.drop)
        url = f"https://{options.address or options.host}:{options.http_port}"
        async with broker, self._grpc_server(), self._http_server(), asyncio.TaskGroup() as tasks:
            self._link.start()
            running = [
                tasks.create_task(self._uplink.run(), name="uplink"),
                tasks.create_task(self._report(), name="region-state"),
            ]
            event(_log, logging.INFO, "region.ready", region=profile.name, url=url, grpc_port=options.grpc_port,
                  parent=profile.parent_grpc, home=options.home)  # fmt: skip
            on_ready(url)
            await stop.wait()
            event(_log, logging.INFO, "region.stopping", region=profile.name)
            self._rounds.interrupt(CloudStopping("the region is stopping; its rounds continue at the next start"))
            for task in running:
                task.cancel()
            await asyncio.to_thread(self._stop)

    def _stop(self) -> None:
        self._link.wake()
        self._storage.wake()
        self._link.close()
        self._heard.close()
        for call in list(self._calls):
            call.cancel()
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
                    pass_renewal=self._uplink.renew,
                    is_renewal_due=self._is_renewal_due,
                    storage=self._storage,
                    broker_url=f"mqtts://:{options.mqtt_port}",
                    admit=port.admit,
                    pace=port.pace,
                    max_transfers=self._shares.transfers,
                    is_over=self._is_over,
                    fetch=self._uplink.fetch,
                    logs=self,
                ),
                workers,
            )
            self._cut += [service.forget, lambda device: self._loop.call_soon_threadsafe(port.drop, device)]
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

    @contextlib.asynccontextmanager
    async def _http_server(self) -> AsyncIterator[None]:
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
        async with serve_http(
            make_region_app(services), options.host, options.http_port,
            server_context(self._identity, client_certificates=False), HttpLimits(max_connections=self._shares.http),
            functools.partial(self.supervisor.report_failure, "https"),
        ):  # fmt: skip
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
            self._uplink.mirror.set(f"region/{self._profile.name}", tiers.pack(state))
            await asyncio.sleep(STATE_EVERY_S)

    # What devices and regions below say, passed on upward.

    def _note_state(self, device: str, state: DeviceState) -> None:
        self._rounds.wake()
        self._uplink.mirror.set(f"state/{device}", encode(state))

    def _note_rollout(self, device: str, note: RolloutNote) -> None:
        self._uplink.mirror.set(f"note/{device}/{note.model}", encode(note))

    def _pass_on(self, key: str, value: bytes | None) -> None:
        if value is None:
            self._uplink.mirror.delete(key)
        else:
            self._uplink.mirror.set(key, value)

    def _is_known(self, name: str, serial: str | None = None) -> bool:
        if self.membership.uses_next(name, serial):
            self._note_serial(name, serial or "")
        return self.membership.is_known(name, serial)

    def _note_serial(self, device: str, serial: str) -> None:
        self._uplink.mirror.set(f"serial/{device}", serial.encode())

    def receive(self, device: str, request: str, text: bytes, *, cut: bool) -> None:
        """Pass on the end of a device's log; raises ProtocolError above the size limit."""
        if len(text) > MAX_BYTES:
            raise ProtocolError(f"the log has {len(text)} bytes; at most {MAX_BYTES} are accepted")
        sent = LogSent(request=request, text=text.decode("utf-8", "replace"), cut=cut)
        self._uplink.mirror.set(f"log/{device}", tiers.pack(sent))

    # What the parent says; in the inbox's thread.

    def _take(self, item: tuple[str, bytes | None, bool]) -> None:
        key, value, is_said = item
        if key.startswith("work/"):
            if value is not None or is_said:  # otherwise the parent was started again, and may not know it yet
                job, number = _round_in(key)
                self._work.take(job, number, None if value is None else tiers.unpack(Work, value))
            return
        if key.startswith("command/"):
            self._take_command(key.removeprefix("command/"), value)
            return
        removed = self.membership.take(key, value)
        if removed:
            for cut in self._cut:
                cut(removed)
            self._link.forget(removed)
            self._uplink.mirror.delete(f"state/{removed}")
            self._uplink.mirror.replace(f"note/{removed}/", {})
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
            self._uplink.mirror.delete(f"serial/{device}")
        elif kind == "certificate-days":
            self._children.note_certificate_days()
        elif kind == "running":
            self._children.note_running()
            self._work.keep_only(self.membership.running())

    def _is_renewal_due(self, certificate: bytes) -> bool:
        days = self.membership.certificate_days()
        return days > 0 and is_due(certificate, days, time.time())

    def _take_command(self, device: str, value: bytes | None) -> None:
        if value is None:
            self._uplink.mirror.delete(f"log/{device}")
        elif self.membership.is_device(device):
            self._link.send_command(device, decode_command(value))

    def _is_over(self, job: str, number: int) -> bool:
        """Whether a round that is not open here will not be: it is over, or its job has ended."""
        ended = not self._uplink.reason and job not in self.membership.running()
        return ended or self._work.is_over(job, number)

    # Called in the threads of rounds.

    def _fetch(self, sha256: str) -> None:
        self._in_loop(self._uplink.fetch(sha256))

    def _send_sum(self, one: SumFile) -> pb.UploadState:
        return self._in_loop(self._uplink.send(one))

    def _in_loop(self, call: Coroutine[Any, Any, _T]) -> _T:
        """Return what a call in the event loop returns; raises CloudStopping if the region stops first."""
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        self._calls.add(future)
        try:
            if self._rounds.stopping:
                future.cancel()
            return future.result()
        except CancelledError as cause:
            raise CloudStopping("the region is stopping; its rounds continue at the next start") from cause
        finally:
            self._calls.discard(future)


def _round_in(key: str) -> tuple[str, int]:
    """Return the job and the round of a key of `work/`; raises ProtocolError."""
    _, job, number = (*key.split("/"), "", "")[:3]
    if not job or not number.isdecimal() or key.count("/") != 2:
        raise ProtocolError(f"{key[:80]!r} is no work of a round")
    return job, int(number)


def _signs_nothing(_bundle: Bundle) -> Signed:
    raise HomeError("a region has no key of the fleet, and signs nothing")
