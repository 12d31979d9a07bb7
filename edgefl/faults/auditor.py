"""The auditor: computes from the log what the model must have become, and says what is wrong with a run.

It shares no code with what it audits, and reads the files of models by itself. The log has one entry per update that a
device trained, per acknowledgement that left a server, and per outcome that the cloud computed; the cloud's own files
say which outcome holds. What must be true:

- every round of the job has ended, and no device works after it;
- a contributor trained on the model before the round, and each device contributes once;
- the model after a round is the one before it, moved by the weighted mean of its contributors' updates, to 1e-6;
- an update that the cloud has acknowledged counts, unless it was refused by name;
- an update that a region has acknowledged counts, or is named; it may be late only shortly after a fault;
- a round that begins when all is well but a region that is away misses no device that knows a parent that is there;
- a device does not train again for a round for which the server that it still has acknowledged its update;
- a device trains for one round at most once more than faults can explain;
- with regional rounds, a contributor's last update began at a model that is the mean of a region's updates before it
  (`edgefl.faults.regional`), and the model after a round is the mean of where their last updates have led.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgefl.faults.regional import RegionalRounds

TOLERANCE = 1e-6
HEAL_S = 60.0  # after the last fault, nothing is late any more
QUIET_S = 40.0  # after the job's end; a device asks every 30 s
_DTYPES = {"F32": "<f4", "F64": "<f8"}


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditedRun:
    """What is known of one run."""

    log: Sequence[Mapping[str, Any]]
    state: str  # of the job
    rounds: int  # of the job's settings
    outcomes: Sequence[Mapping[str, Any]]  # as the cloud has stored them: round, model, admitted (how many)
    models: Mapping[str, bytes]  # by name: safetensors
    first: Mapping[str, np.ndarray]  # the parameters before the first round
    first_name: str  # their hash
    factor: float  # the server's learning rate; below 0 for gradients
    ended_s: float | None  # None = it did not
    last_fault_s: float
    last_short_fault_s: float  # of all but a region that is away for long
    reaches: Collection[str]  # devices that know a parent that is there, also while a region is away
    num_faults: int
    waits_for_all: bool  # whether a round waits for every device that is there
    region_rounds: int = 1
    keeps_parents: bool  # whether no device changes its parent, and no region is asked for a sum again
    problems: Sequence[str] = field(default_factory=tuple)  # that the simulation saw


def audit(run: AuditedRun) -> list[str]:
    """Return what is wrong; empty if nothing is."""
    wrong = list(run.problems)
    if run.ended_s is None:
        return [*wrong, "the job did not end"]
    if run.state != "done":
        wrong.append(f"the job is {run.state}, expected done")
    if run.state == "done" and [one["round"] for one in run.outcomes] != list(range(1, run.rounds + 1)):
        wrong.append(f"the rounds are {[one['round'] for one in run.outcomes]}, expected 1 to {run.rounds}")
    parameters, name, began_s = dict(run.first), run.first_name, 0.0
    for stored in run.outcomes:
        found, parameters = _round(run, stored, parameters, name)
        absent, began_s = _absent(run, stored, began_s)
        wrong += [*found, *absent]
        name = stored["model"]
    return [*wrong, *_work(run)]


def _round(
    run: AuditedRun, stored: Mapping[str, Any], before: Mapping[str, np.ndarray], before_name: str
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Return what is wrong with a round, and the parameters after it."""
    number, wrong = stored["round"], []
    where = f"round {number}"
    after = tensors(run.models[stored["model"]])
    if hashlib.sha256(run.models[stored["model"]]).hexdigest() != stored["model"]:
        wrong.append(f"{where}: the model's file does not have the hash in its name")
    computed = [one for one in run.log if one["kind"] == "outcome" and one["round"] == number
                and one["model"] == stored["model"]]  # fmt: skip
    if not computed:
        return [*wrong, f"{where}: nobody computed the model {stored['model'][:12]}"], after
    outcome = computed[-1]
    wrong += [f"{where}: {device} is counted {times} times"
              for device, times in Counter(outcome["admitted"]).items() if times > 1]  # fmt: skip
    if run.region_rounds > 1:
        return [*wrong, *_regional(run, outcome, before, before_name, after)], after
    updates = {one["device"]: one for one in run.log if one["kind"] == "trained" and one["round"] == number
               and one["base"] == before_name}  # fmt: skip
    strangers = sorted(set(outcome["admitted"]) - updates.keys())
    if strangers:
        return [*wrong, f"{where}: {', '.join(strangers)} contributed, but did not train on the model before"], after
    chosen = [updates[device] for device in outcome["admitted"]]
    wrong += _model(where, chosen, outcome["weight"], before, after, run.factor)
    return [*wrong, *_kept(run, number, outcome)], after


def _regional(
    run: AuditedRun, outcome: Mapping[str, Any], before: Mapping[str, np.ndarray], before_name: str,
    after: Mapping[str, np.ndarray],
) -> list[str]:  # fmt: skip
    """Return what is wrong with a round of several regional ones."""
    number, admitted = outcome["round"], outcome["admitted"]
    where = f"round {number}"
    regional = RegionalRounds(run.log, number, run.region_rounds, before_name, before)
    wrong = [f"{where}: {one}" for one in regional.wrong]
    if strangers := sorted(set(admitted) - regional.devices):
        return [*wrong, f"{where}: {', '.join(strangers)} contributed, but did not train on a region's model"]
    weight = regional.weight(admitted)
    if abs(weight - outcome["weight"]) > TOLERANCE * max(1.0, weight):
        wrong.append(f"{where}: the weight is {outcome['weight']}, expected {weight}")
    worst = min(_distance(before, mean, after, run.factor) for mean in regional.means(admitted))
    if not worst <= TOLERANCE:
        wrong.append(f"{where}: the model differs by {worst:.3g} from the mean of its regions")
    if not run.num_faults and run.waits_for_all:
        wrong += [
            f"{where}: {one['device']}'s update of round {one['round']} is in no region's model"
            for one in run.log
            if one["kind"] == "acknowledged" and (one["round"] - 1) // run.region_rounds == number - 1
            and one["round"] < regional.last and (one["device"], one["round"]) not in regional.counted
        ]  # fmt: skip
    return [*wrong, *_kept(run, regional.last, outcome)]


def _distance(
    before: Mapping[str, np.ndarray], mean: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], factor: float
) -> float:
    """Return how far a model is from the one before it, moved by a mean, of the largest number or 1."""
    worst = 0.0
    for name, old in before.items():
        wanted = old.astype(np.float64) + factor * mean[name]
        scale = max(1.0, float(np.max(np.abs(wanted), initial=0.0)))
        worst = max(worst, float(np.max(np.abs(wanted - after[name]), initial=0.0)) / scale)
    return worst


def _model(
    where: str, chosen: Sequence[Mapping[str, Any]], said_weight: float, before: Mapping[str, np.ndarray],
    after: Mapping[str, np.ndarray], factor: float,
) -> list[str]:  # fmt: skip
    """Compare the model with the weighted mean of the chosen updates."""
    weight = sum(one["weight"] for one in chosen)
    wrong = []
    if abs(weight - said_weight) > TOLERANCE * max(1.0, weight):
        wrong.append(f"{where}: the weight is {said_weight}, expected {weight}")
    if before.keys() != after.keys():
        return [*wrong, f"{where}: the model has {sorted(after)}, expected {sorted(before)}"]
    for name, old in before.items():
        total = sum((one["weight"] * np.array(one["update"][name]) for one in chosen), np.zeros(old.shape))
        wanted = old.astype(np.float64) + factor * total / weight
        worst = float(np.max(np.abs(wanted - after[name]), initial=0.0))
        if not worst <= TOLERANCE * max(1.0, float(np.max(np.abs(wanted), initial=0.0))):
            wrong.append(f"{where}: {name} differs by {worst:.3g} from the weighted mean of its contributors")
    return wrong


def _absent(run: AuditedRun, stored: Mapping[str, Any], began_s: float) -> tuple[list[str], float]:
    """Say which devices a round misses that could have come, and return the time of its end."""
    ends = [one for one in run.log if one["kind"] == "outcome" and one["model"] == stored["model"]]
    if not ends:
        return [], began_s
    outcome, wrong = ends[-1], []
    if run.waits_for_all and began_s > run.last_short_fault_s + HEAL_S:
        wrong = [f"round {stored['round']}: {device} is missing, though it knows a parent that is there"
                 for device in sorted({*outcome["missing"]}.intersection(run.reaches))]  # fmt: skip
    return wrong, outcome["at_s"]


def _kept(run: AuditedRun, number: int, outcome: Mapping[str, Any]) -> list[str]:
    """Say which acknowledged updates are lost."""
    counted = {*outcome["admitted"], *outcome["rejected"], *outcome["failed"]}
    is_calm = outcome["at_s"] > run.last_fault_s + HEAL_S
    wrong = []
    for one in run.log:
        if one["kind"] != "acknowledged" or one["round"] != number or one["device"] in counted:
            continue
        device, by = one["device"], one["by"]
        if one["at_s"] > outcome["at_s"] and by == "cloud":
            wrong.append(f"round {number}: the cloud acknowledged {device}'s update after the round")
        elif by == "cloud":
            wrong.append(f"round {number}: {device}'s update was acknowledged by the cloud, and is lost")
        elif device not in outcome["missing"]:
            wrong.append(f"round {number}: {device}'s update was acknowledged by {by}, and nobody names it")
        elif is_calm and run.waits_for_all:
            wrong.append(f"round {number}: {device}'s update was acknowledged by {by}, and is late without a fault")
    return wrong


def _work(run: AuditedRun) -> list[str]:
    """Say which devices work too much, or for ever."""
    times: Counter[tuple[str, int]] = Counter()
    latest: dict[str, float] = defaultdict(float)
    for one in run.log:
        if one["kind"] == "trained":
            times[one["device"], one["round"]] += 1
            latest[one["device"]] = one["at_s"]
    wrong = [] if not run.keeps_parents else _again(run)
    wrong += [f"{device} trained {count} times for round {number}, with {run.num_faults} faults"
             for (device, number), count in times.items() if count > 1 + 2 * run.num_faults]  # fmt: skip
    end_s = (run.ended_s or 0.0) + QUIET_S
    return wrong + [f"{device} trains {at_s - end_s + QUIET_S:.1f} s after the job's end"
                    for device, at_s in latest.items() if at_s > end_s]  # fmt: skip


def _again(run: AuditedRun) -> list[str]:
    """Say who trained again after its update was acknowledged: then the acknowledged one was lost."""
    first: dict[tuple[str, int], float] = {}
    for one in run.log:
        if one["kind"] == "acknowledged":
            first.setdefault((one["device"], one["round"]), one["at_s"])
    return [
        f"{one['device']} trained for round {one['round']} again, {one['at_s'] - first[key]:.1f} s after its update "
        "was acknowledged"
        for one in run.log
        if one["kind"] == "started" and (key := (one["device"], one["round"])) in first and one["at_s"] > first[key]
    ]


def tensors(data: bytes) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    head = json.loads(data[8 : 8 + length])
    found = {}
    for name, entry in head.items():
        if name != "__metadata__":
            begin, end = (8 + length + one for one in entry["data_offsets"])
            found[name] = np.frombuffer(data[begin:end], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found
