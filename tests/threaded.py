"""What lives in an event loop, for tests without one: a loop in a thread of its own, and links and a broker in it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Self, TypeVar

import pytest

from cloud.broker.builtin import BuiltinBroker
from cloud.broker.link import DeviceLink, DeviceLinkCallbacks
from cloud.shares import PortShare
from edgefl.protocols.mqtt import LinkConfig, MqttLink
from edgefl.protocols.tls import Identity

_T = TypeVar("_T")
CALL_S = 60.0
ROOMY = PortShare(seats=10_000, waiting=256)


class LoopThread:
    """An event loop that runs until `close`."""

    def __init__(self, name: str) -> None:
        started: Future[asyncio.AbstractEventLoop] = Future()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), name=name, daemon=True)
        self._thread.start()
        self.loop = started.result(CALL_S)

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Return what a coroutine returns, run in the loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(CALL_S)

    def call(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Return what a function returns, called in the loop."""

        async def calling() -> _T:
            return function(*arguments)

        return self.run(calling())

    def close(self) -> None:
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(CALL_S)
            assert not self._thread.is_alive()

    async def _serve(self, started: Future[asyncio.AbstractEventLoop]) -> None:
        started.set_result(asyncio.get_running_loop())
        await self._stop.wait()


class Link:
    """An MqttLink in a thread of its own."""

    def __init__(self, config: LinkConfig, **callbacks: Callable[..., Any]) -> None:
        self._link = MqttLink(config, **callbacks)
        self._name = f"link-{config.client_id}"
        self._thread: LoopThread | None = None
        self.publish, self.reconnect = self._link.publish, self._reconnect

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def reason(self) -> str:
        return self._link.reason

    def start(self) -> None:
        self._thread = LoopThread(self._name)
        self._thread.call(self._link.start)

    def wait_connected(self, timeout_s: float) -> bool:
        return self._thread.run(self._link.wait_connected(timeout_s))

    def close(self, flush_s: float = 2.0) -> None:
        if self._thread is not None:
            self._thread.run(self._link.close(flush_s))
            self._thread.close()
            self._thread = None

    def _reconnect(self, reason: str) -> None:
        self._thread.call(self._link.reconnect, reason)


class ThreadedDeviceLink(DeviceLink):
    """A DeviceLink in a thread of its own."""

    def __init__(self, url: str, identity: Identity | None, callbacks: DeviceLinkCallbacks) -> None:
        super().__init__(url, identity, callbacks)
        self._thread = LoopThread("cloud-link")

    def start(self) -> None:
        self._thread.call(super().start)

    def wait_connected(self, timeout_s: float) -> bool:
        return self._thread.run(self._link.wait_connected(timeout_s))

    def close(self) -> None:
        super().close()
        self._thread.close()


class Broker:
    """The built-in broker in a thread of its own; it starts again on its port, as a new one."""

    def __init__(self, identity: Identity | None, host: str, port: int, **options: Any) -> None:
        self._identity, self._host, self.port = identity, host, port
        self._options = {"is_known": lambda *_: True, "share": ROOMY, "on_failure": pytest.fail, **options}
        self._thread: LoopThread | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self.inner = BuiltinBroker(self._identity, self._host, self.port, **self._options)
        thread = LoopThread("broker")
        try:
            thread.run(self.inner.__aenter__())
        except BaseException:
            thread.close()
            raise
        self._thread, self.port, self.url, self.drop = thread, self.inner.port, self.inner.url, self.inner.drop

    def stop(self) -> None:
        if self._thread is not None:
            self._thread.run(self.inner.__aexit__())
            self._thread.close()
            self._thread = None
