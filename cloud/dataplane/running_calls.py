"""Running gRPC calls by device, so that the calls of a removed device are aborted at once.

Invariant: a call is registered before its device is looked up in the registry. So deleting a device and then
aborting its calls leaves none behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc

_T = TypeVar("_T")

Context = grpc.aio.ServicerContext[Any, Any]
Method = Callable[[Any, Context], Awaitable[_T]]


class RunningCalls:
    """All running calls. Used in one event loop only."""

    def __init__(self) -> None:
        self._devices: dict[asyncio.Task[Any], str] = {}
        self._cut: dict[asyncio.Task[Any], str] = {}  # aborted calls, with the reason

    def registered(self, method: Method[_T]) -> Method[_T]:
        """Wrap a method of the service, so that its calls can be aborted."""

        async def call(request: Any, context: Context) -> _T:
            task = _this_task()
            try:
                return await method(request, context)
            except asyncio.CancelledError:
                if task not in self._cut:
                    raise
                task.uncancel()
                return await context.abort(grpc.StatusCode.PERMISSION_DENIED, self._cut[task])
            finally:
                self._devices.pop(task, None)
                self._cut.pop(task, None)

        return call

    def note(self, device: str) -> None:
        """Register the device of the current call."""
        self._devices[_this_task()] = device

    def devices(self) -> set[str]:
        """Return the devices that have running calls."""
        return set(self._devices.values())

    def cut(self, device: str, reason: str) -> None:
        """Abort a device's calls with PERMISSION_DENIED and a reason."""
        for task in [task for task, name in self._devices.items() if name == device]:
            self._cut[task] = reason
            task.cancel()


def _this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("a gRPC call runs in a task, but there is none")
    return task
