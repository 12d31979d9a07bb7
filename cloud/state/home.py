"""The cloud's home folder, opened: keys, database, blobs, and the parts of the cloud that use them.

The first start creates the CA, the fleet's signing key and the operator's credentials; every key has
mode 0600. Layout: tls/, fleet.key, operator.json, cloud.db, cloud.log, blobs/, spool/, relays/.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import secrets
import socket
import urllib.parse
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from cloud.broker.builtin import BuiltinBroker
from cloud.broker.child import BUILTIN, EMBEDDED, MosquittoChild, find_mosquitto
from cloud.broker.inbox import Inbox
from cloud.broker.link import DeviceLink, DeviceLinkCallbacks
from cloud.broker.mosquitto import Mosquitto, MosquittoSettings
from cloud.broker.mosquitto_config import CRL_FILE
from cloud.dataplane.device_logs import DeviceLogs
from cloud.dataplane.grpc_fleet import FleetDependencies
from cloud.dataplane.open_rounds import OpenRounds
from cloud.dataplane.relays import RelayDependencies, Relays
from cloud.http.services import Services
from cloud.jobs.choice import ChoiceBoard
from cloud.jobs.control import JobControl
from cloud.jobs.device_shares import DeviceShares
from cloud.jobs.participations import load_history
from cloud.region.children import Children, ChildrenDependencies
from cloud.region.parents import ParentLists, address_of
from cloud.region.reports import RegionReports
from cloud.shares import Shares
from cloud.state.blobs import BlobStore
from cloud.state.enrolment import Enrolment
from cloud.state.jobs import JobRow, Jobs
from cloud.state.members import Members
from cloud.state.registry import Registry
from cloud.state.relay_rows import RelayRows
from cloud.state.rollout import Rollouts
from cloud.state.spool import Spool
from cloud.state.storage import Storage
from cloud.state.store import open_database
from cloud.supervisor import Supervisor, database_fault, disk_fault
from cloud.trust.own_certificates import renew_ca, renew_server
from edgefl.choosing.history import History
from edgefl.choosing.needs import reads_history
from edgefl.errors import ConfigError
from edgefl.logs import event
from edgefl.operator.credentials import write_operator_credentials
from edgefl.process.descriptors import raise_limit
from edgefl.process.home import create_home, lock_home, replace_file
from edgefl.protocols.addresses import is_address, is_loopback
from edgefl.protocols.manifest import (
    Bundle,
    ParentAddress,
    load_private_key,
    new_fleet_key,
    public_pem,
    save_private_key,
    sign,
)
from edgefl.protocols.messages import DeviceState, RolloutNote, Signed, Telemetry
from edgefl.protocols.tls import BROKER_NAME, CLOUD_NAME, LEAF_DAYS, Identity, create_ca

LOG_FILE = "cloud.log"
MAX_JOBS = 8  # that run at the same time

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class AggregatorOptions:
    """The options of `edgefl cloud start`."""

    home: Path
    host: str = "127.0.0.1"
    grpc_port: int = 9440
    http_port: int = 9480
    mqtt_port: int = 8883  # of the cloud's own broker
    # `embedded`: the cloud's own broker, which is mosquitto if installed, otherwise the built-in one. `builtin`: always
    # the built-in one. Otherwise the URL of another broker: mqtts://host:port, mqtt://host:port.
    broker: str = EMBEDDED
    insecure: bool = False
    names: tuple[str, ...] = ()  # more names and addresses at which devices reach this cloud
    broker_pid_file: Path | None = None  # of a mosquitto on this machine; None = as in its generated configuration
    certificate_days: float = LEAF_DAYS  # lifetime of new certificates
    kept_models: int = 3  # number of latest rounds whose parameters are kept, for evaluation
    kept_rounds: int = 1000  # number of latest rounds whose outcomes are kept; more while a follower has not read them

    def __post_init__(self) -> None:
        if self.insecure and not is_loopback(self.host):
            raise ConfigError(
                f"--insecure is for loopback only, --host is {self.host}; drop --insecure, or use a loopback address"
            )
        url = urllib.parse.urlsplit(self.broker)
        if not self.has_own_broker and (url.scheme not in {"mqtt", "mqtts"} or not url.hostname or not url.port):
            raise ConfigError(f"--broker={self.broker!r} is invalid; expected embedded, builtin or mqtts://host:port")
        if url.scheme == "mqtt" and not self.insecure:
            raise ConfigError(f"--broker={self.broker} is not encrypted; use mqtts://, or --insecure on loopback")

    @property
    def has_own_broker(self) -> bool:
        """Whether the cloud runs its broker itself."""
        return self.broker in {EMBEDDED, BUILTIN}


class CloudHome:
    """Everything in one home, which it locks, as a context manager."""

    def __init__(self, options: AggregatorOptions) -> None:
        self._options = options
        self._exit = contextlib.ExitStack()
        home = options.home
        self._program = find_mosquitto() if options.broker == EMBEDDED and not options.insecure else None
        is_builtin = options.has_own_broker and self._program is None
        self.shares = Shares.of(raise_limit(), builtin_broker=is_builtin)
        self.broker_name = "builtin" if is_builtin else "mosquitto" if self._program else "external"
        create_home(home, "cloud")
        self._exit.callback(lock_home(home).close)
        self._tls = home / "tls"
        self.identity = Identity.in_folder(self._tls)
        scheme = "http" if options.insecure else "https"
        self.url = f"{scheme}://{_reachable(options.host)}:{options.http_port}"
        self._make_keys()
        self._fleet_key = load_private_key(home / "fleet.key")
        engine = open_database(home / "cloud.db")
        self._exit.callback(engine.dispose)
        self.enrolment = Enrolment(engine, self._tls, certificate_days=options.certificate_days)
        if not self.enrolment.has_open_tokens() and renew_ca(self._tls):
            event(_log, logging.INFO, "cloud.ca_renewed", file=self.identity.ca)
        self._renew_certificate()
        self._operator_token = self._make_operator()
        self.storage = Storage(home)
        self.blobs = BlobStore(home / "blobs")
        self.supervisor = Supervisor()
        self.spool = Spool(home / "spool")
        self.rounds = OpenRounds()
        self._renewed: list[Callable[[], object]] = []  # make brokers reload their certificates
        self.cut: list[Callable[[str], object]] = []  # end the connections of a removed device
        self.jobs = Jobs(engine, self.blobs, self._sign)
        self.jobs.waiting = self.storage.waiting
        self.board = ChoiceBoard()
        self.control = JobControl(engine, self.jobs, self.blobs, self._sign, self.board)
        self._engine = engine
        self._make_link()
        self.device_shares = DeviceShares(changed=self.link.wake)
        self.relays = Relays(
            RelayDependencies(
                RelayRows(engine), self.rounds, self.spool, self.link, self._sign, home / "relays", self.storage
            )
        )
        self.device_logs = DeviceLogs(self.link)
        self.members = Members(engine)
        self.storage.changed = self._wake_waiting
        self.registry = Registry(engine, self.blobs, self._fleet_key)
        self.rollouts = Rollouts(
            engine, self.registry, self._fleet_key, devices=self.enrolment.devices, send_desired=self.link.send_desired
        )
        self.parents = ParentLists(engine, self._fleet_key, _address(options), self.link.send_parents)
        self._region_reports = RegionReports(self.parents, self.enrolment, self.members)
        self.children = Children(
            ChildrenDependencies(
                name=CLOUD_NAME,
                rounds=self.rounds,
                members=self.members,
                crl=self.enrolment.crl,
                desired_for=self.rollouts.desired_for,
                running=lambda: [*self.jobs.running(), *self.relays.running()],
                parent_lists=self.parents.all,
                certificate_days=lambda: options.certificate_days,
                heard=self.link.hear,
                told=self._region_reports.told,
                used=self._region_reports.used,
                log=self.device_logs.take,
            )
        )
        # Where devices may connect, before who may connect: a region tells the devices that it loses where to go.
        self.members.changed += [self.parents.refresh, self.children.refresh]
        self.link.children = self.children
        self._notes: Inbox[tuple[str, RolloutNote]] = Inbox("rollout-notes", lambda one: self.rollouts.note(*one))
        self._exit.callback(self._notes.close)
        self._add_health_checks(home)

    def __enter__(self) -> Self:
        self._notes.start()
        self._region_reports.start()
        self._exit.callback(self._region_reports.close)
        if not self._options.has_own_broker and not self._options.insecure:
            mosquitto = self._mosquitto(self._options.broker, self._options.home / "mosquitto")
            mosquitto.begin()
            self.cut.append(mosquitto.drop)
            self._renewed.append(mosquitto.refresh)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    @contextlib.asynccontextmanager
    async def broker(self) -> AsyncIterator[None]:
        """Run the cloud's own broker, if it has one, within the block; raises ConfigError if it does not start."""
        if not self._options.has_own_broker:
            yield
            return
        async with self._own_broker() as broker:
            self.cut.append(broker.drop)
            self._renewed.append(broker.refresh)
            self.supervisor.add_check("broker", lambda: broker.reason)
            yield

    def renew_certificates(self) -> bool:
        """Renew certificates if necessary; returns whether the cloud's own one was renewed."""
        renewed = self._renew_certificate()
        for refresh in self._renewed:
            refresh()
        return renewed

    def fleet_dependencies(self) -> FleetDependencies:
        """Return what the fleet of a job needs."""
        return FleetDependencies(
            self.rounds, self.jobs, self.blobs, self.spool, self.link, self.storage, shares=self.device_shares,
            board=self.board,
        )  # fmt: skip

    def history_of(self, row: JobRow) -> History | None:
        """Return what is known of the devices in a job's earlier rounds, if its cohorts depend on it."""
        return load_history(self._engine, row.id) if reads_history(row.config.rounds) else None

    def services(self) -> Services:
        """Return the parts that the HTTPS plane uses."""
        return Services(
            enrolment=self.enrolment,
            members=self.members,
            regions=self.children.regions,
            registry=self.registry,
            rollouts=self.rollouts,
            jobs=self.jobs,
            control=self.control,
            relays=self.relays,
            blobs=self.blobs,
            storage=self.storage,
            link=_Presence(self.link, self.cut),
            ca_pem=self.identity.ca.read_bytes(),
            fleet_key_pem=public_pem(self._fleet_key),
            grpc_port=self._options.grpc_port,
            broker_url=self.broker_url,
            operator_token=self._operator_token,
            health=self.supervisor.reasons,
            broker=self.broker_name,
            device_logs=self.device_logs,
            log_file=self._options.home / LOG_FILE,
            max_jobs=MAX_JOBS,
        )

    def _own_broker(self) -> BuiltinBroker | MosquittoChild:
        options = self._options
        on_failure = functools.partial(self.supervisor.report_failure, "broker")
        if self._program is None:
            identity = None if options.insecure else self.identity
            return BuiltinBroker(
                identity, options.host, options.mqtt_port, is_known=self.enrolment.is_known,
                share=self.shares.devices, on_failure=on_failure,
            )  # fmt: skip
        folder = (options.home / "broker").resolve()
        folder.mkdir(mode=0o700, exist_ok=True)
        replace_file(folder / "ca.pem", self.identity.ca.read_bytes())
        replace_file(folder / CRL_FILE, self.enrolment.crl())
        renew_server(self._tls, Identity.in_folder(folder), _hosts(options), BROKER_NAME, options.certificate_days)
        control = self._mosquitto(self._own_url, folder)
        return MosquittoChild(self._program, folder, options.host, options.mqtt_port, control)

    def _mosquitto(self, url: str, folder: Path) -> Mosquitto:
        return Mosquitto(
            MosquittoSettings(
                url=url,
                folder=folder,
                ca_folder=self._tls,
                revoked=self.enrolment.revoked,
                certificate_days=self._options.certificate_days,
                pid_file=self._options.broker_pid_file,
                removed=self.enrolment.removed_lately(),
            )
        )

    def _make_link(self) -> None:
        options = self._options
        scheme = "mqtt" if options.insecure else "mqtts"
        own = options.has_own_broker
        self._own_url = f"{scheme}://{_reachable(options.host)}:{options.mqtt_port}" if own else options.broker
        # No host for its own broker: a device uses the one at which it reaches the cloud.
        self.broker_url = f"{scheme}://:{options.mqtt_port}" if own else options.broker
        callbacks = DeviceLinkCallbacks(
            on_failure=lambda error: self.supervisor.report_failure("link", error),
            on_state=self._note_presence,
            on_note=self._note_rollout,
            is_known=self.enrolment.is_device,
        )
        self.link = DeviceLink(self._own_url, None if options.insecure else self.identity, callbacks)
        self._exit.callback(self.link.close)

    def _sign(self, bundle: Bundle) -> Signed:
        return sign(bundle, self._fleet_key)

    def _note_presence(self, _device: str, _state: DeviceState) -> None:
        self._wake_waiting()

    def _wake_waiting(self) -> None:
        """Make rounds and relays check presence and the storage."""
        self.rounds.wake()
        self.relays.wake()

    def _note_rollout(self, device: str, note: RolloutNote) -> None:
        self._notes.put(device, (device, note))  # in another thread, because it writes to the database

    def _add_health_checks(self, home: Path) -> None:
        """Register the health checks of the parts in this class."""
        self.supervisor.add_check("link", lambda: self.link.reason)
        if not self._options.has_own_broker:
            self.supervisor.add_check("broker", lambda: self.link.reason)
        self.supervisor.add_check(
            "database", lambda: self.link.held_up or self._notes.reason or database_fault(home / "cloud.db")
        )
        self.supervisor.add_check("disk", lambda: self.storage.waiting() or disk_fault(home))

    def _make_keys(self) -> None:
        self._tls.mkdir(mode=0o700, exist_ok=True)
        if not (self._tls / "ca.pem").exists():
            create_ca(self._tls)
        if not (self._options.home / "fleet.key").exists():
            save_private_key(new_fleet_key(), self._options.home / "fleet.key")

    def _renew_certificate(self) -> bool:
        options = self._options
        renewed = renew_server(self._tls, self.identity, _hosts(options), CLOUD_NAME, options.certificate_days)
        if renewed:
            event(_log, logging.INFO, "cloud.certificate_renewed", file=self.identity.cert)
        return renewed

    def _make_operator(self) -> str:
        path = self._options.home / "operator.json"
        token = str(json.loads(path.read_text(encoding="utf-8"))["token"]) if path.exists() else ""
        token = token or secrets.token_urlsafe(32)
        write_operator_credentials(self._options.home, self.url, token, self.identity.ca.read_bytes())
        return token


@dataclass(frozen=True, slots=True)
class _Presence:
    """The link for the HTTPS plane: `forget` also ends all connections of a removed device."""

    _link: DeviceLink
    _cut: Sequence[Callable[[str], object]]

    def state(self, device: str) -> DeviceState | None:
        return self._link.state(device)

    def via(self, device: str) -> str:
        return self._link.via(device)

    def telemetry(self, device: str) -> Telemetry | None:
        return self._link.telemetry(device)

    def forget(self, device: str) -> None:
        with contextlib.ExitStack() as every:  # all of them, even if one raises
            every.callback(self._link.forget, device)  # last, after the broker has published the device's will
            for cut in reversed(self._cut):
                every.callback(cut, device)


def _address(options: AggregatorOptions) -> ParentAddress:
    """Return where devices reach this cloud."""
    broker = f":{options.mqtt_port}" if options.has_own_broker else options.broker
    return address_of(
        CLOUD_NAME, options.names[0] if options.names else options.host, options.http_port, options.grpc_port, broker
    )


def _reachable(host: str) -> str:
    """Return the address at which this machine reaches its own server."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104 - not bound


def _hosts(options: AggregatorOptions) -> list[str]:
    """Return the names and addresses for the server's certificate."""
    local = [address.address for nic in psutil.net_if_addrs().values() for address in nic]
    addresses = [address for text in local if is_address(address := text.partition("%")[0])]
    named = [options.host, "localhost", socket.gethostname(), *options.names]
    return sorted({*named, "127.0.0.1", "::1", *addresses} - {"0.0.0.0", "::"})  # noqa: S104
