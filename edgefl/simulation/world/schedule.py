"""When each client of a round would answer, computed before any training.

    arrival = start + delay + download (bytes / link + rtt) + samples * epochs / speed + upload (+ rtt)

A client that still works for the round before (`rounds.late`) starts when it has finished that.
The times follow from sizes alone, so late or lost clients need not be trained at all.
Invariant: a schedule depends on the devices, the plan and its start, never on the speed of this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from edgefl.records import Plan
from edgefl.simulation.engines.client_states import RoundBytes
from edgefl.simulation.world.devices import Devices, SimulatedDevice
from edgefl.trees import encoded_bytes

MODEL_COPIES = 4  # in a device's memory: weights, gradients, the optimizer's state, the update
MIB = 2**20

NumSamples = Callable[[str], int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """A round's expected answers, in seconds of the virtual clock."""

    end_s: float  # the deadline
    arrivals: Mapping[str, float]  # client -> time; earliest first
    late: tuple[str, ...]  # would answer after the deadline
    lost: Mapping[str, float]  # client -> when it goes offline
    refused: Mapping[str, str]  # client -> why it cannot train; reported at its arrival
    begins: Mapping[str, float] = field(default_factory=dict)  # client -> when it starts, if later than the round


def make_schedule(  # noqa: PLR0913 - what clients have and do before it
    devices: Devices, plan: Plan, num_samples: NumSamples, start_s: float, have_frozen: Collection[str] = (), *,
    busy: Mapping[str, float] = MappingProxyType({}), moved: RoundBytes | None = None,
) -> Schedule:  # fmt: skip
    """Compute a round's schedule; drains the devices' batteries accordingly.

    `have_frozen` are the clients that need not fetch the frozen tensors again; `busy` says until when some are busy.
    """
    moved = moved or RoundBytes(plan)
    model_bytes, end_s = encoded_bytes(plan.parameters), start_s + plan.deadline_s
    frozen_bytes = encoded_bytes(plan.frozen) if plan.frozen else 0
    arrivals, lost = dict[str, float](), dict[str, float]()
    refused, late = dict[str, str](), list[str]()
    for client in plan.clients:
        device, training_s, begin_s = devices.device(client), 0.0, max(start_s, busy.get(client, start_s))
        if reason := _too_small(device, model_bytes, frozen_bytes):
            refused[client], answer_s = reason, begin_s + device.rtt_s
        else:
            fetched_bytes = moved.down(client) + (0 if client in have_frozen else frozen_bytes)
            ready_s = begin_s + devices.delay_s(client, plan.round) + device.download_s(fetched_bytes)
            samples = num_samples(client)
            training_s = device.compute_s(plan.train.num_trained(samples)) if samples else 0.0
            answer_s = ready_s + training_s + device.upload_s(moved.up if training_s else 0)  # without data: no
        silent_s = _silent_s(devices, client, plan.round, begin_s, answer_s)
        devices.spend(client, begin_s, training_s)  # last: the drain counts from the next round on
        if silent_s is not None and silent_s < end_s:
            lost[client] = silent_s
        elif silent_s is not None or answer_s > end_s:
            late.append(client)
        else:
            arrivals[client] = answer_s
    soonest = sorted(arrivals.items(), key=lambda arrival: (arrival[1], arrival[0]))
    return Schedule(
        end_s=end_s,
        arrivals=dict(soonest),
        late=tuple(late),
        lost=lost,
        refused=refused,
        begins={client: at_s for client, at_s in busy.items() if at_s > start_s},
    )


def _silent_s(devices: Devices, client: str, round_number: int, start_s: float, answer_s: float) -> float | None:
    """Return when a client goes offline, if before its answer."""
    leaves_s = devices.until_s(client, start_s)
    share = devices.drops_out(client, round_number)
    if share is not None:
        leaves_s = min(leaves_s, start_s + share * (answer_s - start_s))
    return leaves_s if leaves_s < answer_s else None


def _too_small(device: SimulatedDevice, model_bytes: int, frozen_bytes: int) -> str | None:
    what = "what is trained, and what is frozen once" if frozen_bytes else "the model"
    needed_mb = (MODEL_COPIES * model_bytes + frozen_bytes) / MIB
    if needed_mb <= device.memory_mb:
        return None
    return f"training needs {needed_mb:.1f} MB, {MODEL_COPIES} times {what}; the device has {device.memory_mb:.1f} MB"
