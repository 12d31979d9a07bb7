"""The processes that train as one: how they agree, and how one of them says that it failed.

Beside torch's default process group, which training uses, they have two groups of their own, always by gloo:
*control* carries requests and agreements, *alarms* carries why a process could not go on, while the others wait for it.
Neither is torch's default group, which belongs to the training, or to the user's `fit`.
Invariant: all processes take part in every `broadcast` and `gather`, in the same order.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from edgefl.errors import TaskError
from edgefl.terminal.text import one_line

if TYPE_CHECKING:
    import torch

WAIT = timedelta(days=300)  # the round's deadline ends a process that waits too long; the agent keeps it
ALARM_BYTES = 2048


class TrainingGroup:
    """The processes of a training, as one of them sees them.

    `store` is a `torch.distributed.Store` that all `size` of them share; one of them is the leader, which returns
    results. `host` names this one's machine.
    """

    def __init__(self, store: Any, rank: int, size: int, *, leads: bool, host: str) -> None:
        self.rank, self.size, self.leads = rank, size, leads
        self.refused = False  # whether all processes raised an error together: they can go on with the next request
        self._store, self._openings, self._backend = store, 0, ""
        self._control, self._alarms = (_own_group(name, store, rank, size) for name in ("control", "alarms"))
        seen = self.gather({"leads": leads, "host": host, "port": _free_port()})
        self.names = [f"process {number} on {one['host']}" for number, one in enumerate(seen)]
        self._addresses = [f"{one['host']}:{one['port']}" for one in seen]
        self.leader = next((number for number, one in enumerate(seen) if one["leads"]), 0)

    def broadcast(self, data: bytes | None = None) -> bytes:
        """Send the leader's bytes to all; every process returns them."""
        import torch

        length = torch.tensor([0 if data is None else len(data)])
        self._control.broadcast(length, self.leader).wait()
        body = torch.zeros(int(length), dtype=torch.uint8)
        if data:
            body[:] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._control.broadcast(body, self.leader).wait()
        return body.numpy().tobytes()

    def gather(self, said: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return what each process said, by rank; JSON data."""
        import torch

        body = json.dumps(said).encode()
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._control.allgather([lengths], [torch.tensor([len(body)])]).wait()
        padded = torch.zeros(max(int(one) for one in lengths), dtype=torch.uint8)
        padded[: len(body)] = torch.frombuffer(bytearray(body), dtype=torch.uint8)
        bodies = [torch.zeros_like(padded) for _ in range(self.size)]
        self._control.allgather([bodies], [padded]).wait()
        return [json.loads(one.numpy().tobytes()[: int(size)]) for one, size in zip(bodies, lengths, strict=True)]

    def raise_alarm(self, reason: str) -> None:
        """Tell the leader why this process cannot go on; the others wait in vain until they are ended."""
        import torch

        body = torch.zeros(ALARM_BYTES, dtype=torch.uint8)
        text = f"{self.names[self.rank]}: {reason}".encode()[:ALARM_BYTES]
        body[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._alarms.send([body], self.leader, 0).wait()

    def watch(self, on_alarm: Callable[[str], None]) -> None:
        """Wait for an alarm, which only the leader gets, and call `on_alarm` with its reason."""
        import torch

        body = torch.zeros(ALARM_BYTES, dtype=torch.uint8)
        self._alarms.recv_anysource([body], 0).wait()
        on_alarm(body.numpy().tobytes().rstrip(b"\0").decode(errors="replace"))

    def agree(self, said: Mapping[str, Any], why: TaskError | None) -> None:
        """Compare what all processes say; raises TaskError with the first one that failed, or that differs.

        `why` is this process's failure, if it has one. Then all raise, and none waits for another.
        """
        every = self.gather({"fault": one_line(str(why), ALARM_BYTES) if why else "", "said": dict(said)})
        self.refused = True  # unless they agree
        for name, one in zip(self.names, every, strict=True):
            if one["fault"]:
                raise TaskError(f"{name}: {one['fault']}") from why
        first = every[0]["said"]
        for name, one in zip(self.names, every, strict=True):
            for what, value in one["said"].items():
                if value != first[what]:
                    raise TaskError(
                        f"the processes of this site disagree on the {what}: {name} has {_short(value, first[what])}, "
                        f"{self.names[0]} has {_short(first[what], value)}. All need the same task and the same data"
                    )
        self.refused = False

    def open(self, backend: str) -> None:
        """Make torch's default process group, unless it exists; the backend is the device's, if none is named."""
        import torch
        import torch.distributed as dist

        chosen = backend or dist.get_default_backend_for_device(_accelerator())
        if dist.is_initialized():
            if chosen == self._backend:
                return
            dist.destroy_process_group()
        for name in chosen.split(","):  # as in cpu:gloo,cuda:nccl
            if not dist.is_backend_available(name.rpartition(":")[2]):
                raise TaskError(f"train.backend={chosen!r}: this torch has {', '.join(_backends())} only")
        self._openings += 1  # a store keeps what an earlier group wrote
        store = _part_of(self._store, f"training-{self._openings}")
        try:
            dist.init_process_group(chosen, store=store, rank=self.rank, world_size=self.size, timeout=WAIT)
        except (ValueError, RuntimeError) as cause:  # e.g. nccl without a GPU
            raise TaskError(f"train.backend={chosen!r} cannot be used here: {one_line(str(cause), 300)}") from cause
        self._backend = chosen
        if torch.accelerator.is_available():
            number = int(os.environ.get("LOCAL_RANK", "0"))
            torch.accelerator.set_device_index(number % torch.accelerator.device_count())

    @contextmanager
    def environment(self) -> Iterator[None]:
        """Give the user's `fit` the environment of its process group, as torchrun and TensorFlow name it.

        MASTER_PORT is new each time; the addresses of TF_CONFIG stay, as TensorFlow's server does.
        """
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()  # `fit` makes its own
        port = self.gather({"port": _free_port()})[0]["port"]
        task = {"cluster": {"worker": self._addresses}, "task": {"type": "worker", "index": self.rank}}
        mine = {
            "RANK": str(self.rank), "WORLD_SIZE": str(self.size), "MASTER_ADDR": self._addresses[0].rpartition(":")[0],
            "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False", "TF_CONFIG": json.dumps(task),
        }  # fmt: skip
        before = {name: os.environ.get(name) for name in mine}
        os.environ.update(mine)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
            if dist.is_initialized():
                dist.destroy_process_group()


def _own_group(name: str, store: Any, rank: int, size: int) -> Any:
    """Return a group by gloo that torch's registry does not know."""
    from torch.distributed import ProcessGroupGloo

    make: Any = ProcessGroupGloo  # torch's stubs lack its methods
    return make(_part_of(store, name), rank, size, WAIT)


def _part_of(store: Any, name: str) -> Any:
    from torch.distributed.distributed_c10d import PrefixStore

    return PrefixStore(name, store)


def _backends() -> Sequence[str]:
    import torch.distributed as dist

    return [name for name in dist.Backend.backend_list if name != "undefined" and dist.is_backend_available(name)]


def _accelerator() -> torch.device:
    import torch

    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _short(value: Any, other: Any) -> str:
    """Return a value for a message; of mappings, the first entry that differs."""
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        name = next((key for key in [*value, *other] if value.get(key) != other.get(key)), "")
        return f"{name!r}: {value.get(name, 'none')}"
    return one_line(str(value), 100)
