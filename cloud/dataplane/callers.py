"""Who calls the data plane: a device or a region, by the certificate that the TLS handshake has verified."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc

from cloud.dataplane.open_rounds import OpenRounds
from cloud.dataplane.running_calls import RunningCalls
from edgefl.protocols.messages import Signed, encode
from edgefl.protocols.tls import common_name, is_region, serial_number

RESUME_S = 10.0
MAX_CERTIFICATES = 4096  # parsed certificates in the cache
DEVICE_METADATA = "edgefl-device"  # the device's name in insecure mode, without certificates
PARENTS_METADATA = "edgefl-parents-bin"  # with a refusal: where the device may connect instead

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class CallerChecks:
    """What decides whether a caller is served."""

    is_known: Callable[[str, str | None], bool]  # name, serial number of its certificate
    was_known: Callable[[str, str | None], bool] = lambda _name, _serial: False  # a moment ago: it is not asked again
    insecure: bool = False
    admit: Callable[[str, str], str] = lambda _device, _peer: ""  # why a connection is refused; empty = it is not
    pace: Callable[[str], float] = lambda _key: 0.0  # how long a call with this certificate must wait (s)
    parents_for: Callable[[str], Signed | None] = lambda _device: None  # where a device may connect
    unsure: Callable[[], str] = lambda: ""  # why this side may not know who is enrolled; empty = it knows


class Callers:
    """Names the callers, in the event loop; what blocks runs in `workers`."""

    def __init__(
        self, checks: CallerChecks, calls: RunningCalls, workers: ThreadPoolExecutor, rounds: OpenRounds | None = None
    ) -> None:
        self._checks, self._calls, self._workers, self._rounds = checks, calls, workers, rounds

    async def device(self, context: Context) -> str:
        """Return the calling device's name; aborts the call if it is not, or no longer, enrolled."""
        return await self._name(context, region=False)

    async def region(self, context: Context) -> str:
        """Return the calling region's name, as `device` does."""
        return await self._name(context, region=True)

    async def any(self, context: Context) -> str:
        """Return the name of a device or a region, as `device` does."""
        return await self._name(context, region=None)

    def is_region(self, context: Context) -> bool:
        """Whether the caller, whose name was returned, is a region."""
        return not self._checks.insecure and _names_in(certificate_of(context))[2]

    async def _name(self, context: Context, *, region: bool | None) -> str:
        run = asyncio.get_running_loop().run_in_executor
        rounds = self._rounds
        resumed = rounds is None or rounds.wait_resumed(0) or await run(self._workers, rounds.wait_resumed, RESUME_S)
        if not resumed:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the cloud is reopening its rounds after a restart; retry")
        name, serial, of_region = (
            self._insecure_peer(context) if self._checks.insecure else _names_in(certificate_of(context))
        )
        self._calls.note(name)
        key = name if serial is None else f"{name} {serial}"  # a revoked certificate has a share of its own
        if (wait_s := self._checks.pace(key)) > 0:  # the number of waiting calls is bounded by the streams
            await asyncio.sleep(wait_s)
        if region is not None and region is not of_region:
            kind, wanted = ("region", "device") if of_region else ("device", "region")
            await context.abort(
                grpc.StatusCode.PERMISSION_DENIED,
                f"the certificate of {name!r} is that of a {kind}; this call is for a {wanted}'s. Enrol with a token "
                f"for a {wanted}: `edgefl cloud token --role {wanted}`",
            )
        known = self._checks.was_known(name, serial) or await run(self._workers, self._checks.is_known, name, serial)
        if not known:
            caller = f"{'region' if of_region else 'device'} {name!r}"
            if (moved := self._checks.parents_for(name)) is not None:
                context.set_trailing_metadata(((PARENTS_METADATA, encode(moved)),))
            elif why := self._checks.unsure():
                await context.abort(
                    grpc.StatusCode.UNAVAILABLE, f"this region does not know {caller}, and cannot ask its parent: {why}"
                )
            await context.abort(
                grpc.StatusCode.PERMISSION_DENIED,
                f"{caller} is not enrolled, or not with this certificate; enrol it with a new token",
            )
        if refusal := self._checks.admit(name, context.peer()):
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, refusal)
        return name

    @staticmethod
    def _insecure_peer(context: Context) -> tuple[str, None, bool]:
        name = dict(context.invocation_metadata() or ()).get(DEVICE_METADATA, "")
        return str(name), None, False


@functools.lru_cache(MAX_CERTIFICATES)
def _names_in(cert: bytes) -> tuple[str, str, bool]:
    return common_name(cert), serial_number(cert), is_region(cert)


def certificate_of(context: Context) -> bytes:
    """Return the caller's certificate (PEM)."""
    found: bytes = next(iter(context.auth_context()["x509_pem_cert"]))
    return found
