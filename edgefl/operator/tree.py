"""The fleet as a tree: the cloud, regions below each other, and the devices of each.

A device that is online stands below the region through which it is connected, others below the first of their parents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgefl.operator.client import Json
from edgefl.protocols.tls import CLOUD_NAME

CLOUD, REGION, DEVICE = "cloud", "region", "device"
_SCALES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@dataclass(slots=True)
class FleetNode:
    """The cloud, a region or a device, and what is below it."""

    name: str
    kind: str  # CLOUD, REGION or DEVICE
    online: bool = True
    facts: dict[str, Any] = field(default_factory=dict)  # more about it, as in its JSON
    children: list[FleetNode] = field(default_factory=list)

    def as_json(self) -> Json:
        """Return this part of the tree as JSON."""
        below = {"children": [one.as_json() for one in self.children]} if self.kind != DEVICE else {}
        return {"name": self.name, "kind": self.kind, "online": self.online, **self.facts, **below}

    def devices(self) -> list[FleetNode]:
        """Return the devices at any depth below."""
        return [found for one in self.children for found in ([one] if one.kind == DEVICE else one.devices())]


def fleet_tree(regions: Sequence[Json], devices: Sequence[Json]) -> FleetNode:
    """Return the tree of what a cloud's lists of regions and of devices hold."""
    nodes = {CLOUD_NAME: FleetNode(CLOUD_NAME, CLOUD)}
    for one in regions:
        facts = {key: value for key, value in (one["state"] or {}).items() if key != "parent"}
        nodes[one["name"]] = FleetNode(one["name"], REGION, bool(one["online"]), {"parent": one["parent"], **facts})
    for one in regions:
        nodes.get(one["parent"], nodes[CLOUD_NAME]).children.append(nodes[one["name"]])
    for one in devices:
        parents = list(one.get("parents") or [CLOUD_NAME])
        via = (one.get("via") or CLOUD_NAME) if one["online"] else parents[0]
        deepest = _deepest(nodes, via, parents)
        facts = {"via": deepest if one["online"] else "", "parents": parents}
        nodes.get(deepest, nodes[CLOUD_NAME]).children.append(FleetNode(one["name"], DEVICE, one["online"], facts))
    return nodes[CLOUD_NAME]


def _deepest(nodes: Mapping[str, FleetNode], via: str, parents: Sequence[str]) -> str:
    """Return the parent that a device is connected to, if the cloud knows only the region above that one.

    A cloud knows through which of its own regions a device is connected; of the device's parents there, that region
    and those below it, the first that is online is shown.
    """
    if via == CLOUD_NAME or via not in nodes:
        return via
    there = {via, *_names(nodes[via])}
    return next((one for one in parents if one in there and nodes[one].online), via)


def _names(node: FleetNode) -> set[str]:
    inside = [one for one in node.children if one.kind == REGION]
    return {one.name for one in inside}.union(*(_names(one) for one in inside))


def tree_lines(root: FleetNode) -> Iterator[str]:
    """Yield the tree as lines of text."""
    yield node_text(root)
    yield from _below(root, "")


def _below(node: FleetNode, indent: str) -> Iterator[str]:
    for one in node.children:
        is_last = one is node.children[-1]
        yield f"{indent}{'`-- ' if is_last else '|-- '}{node_text(one)}"
        yield from _below(one, indent + ("    " if is_last else "|   "))


def node_text(node: FleetNode) -> str:
    """Return a node's name and details on one line."""
    return "  ".join([node.name, *filter(None, [details_text(node)])])


def details_text(node: FleetNode) -> str:
    """Return a node's state, traffic and part in a job on one line; empty for a cloud without devices."""
    parts = []
    if node.kind == REGION:
        parts += ["online" if node.online else "not connected", *([traffic_text(node)] if node.online else [])]
    elif node.kind == DEVICE:
        parts.append("online" if node.online else "offline")
        if len(node.facts["parents"]) > 1:
            parts.append("parents " + ",".join(node.facts["parents"]))
    if node.kind != DEVICE:
        devices = node.devices()
        parts.append(f"{sum(one.online for one in devices)} of {len(devices)} devices online")
    if "job" in node.facts:
        parts.append(part_text(node.facts["job"]))
    return "  ".join(parts)


def traffic_text(node: FleetNode) -> str:
    """Return the bytes that a region has moved since its start, with its devices and with its parent."""
    facts = node.facts
    devices = f"{bytes_text(facts['devices_down_bytes'])} down {bytes_text(facts['devices_up_bytes'])} up"
    parent = f"{bytes_text(facts['parent_down_bytes'])} down {bytes_text(facts['parent_up_bytes'])} up"
    return f"devices {devices}, parent {parent}"


def bytes_text(count: int) -> str:
    """Return a number of bytes for people, such as 3.2 MB."""
    for scale, unit in _SCALES:
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def part_text(part: Json) -> str:
    """Return a node's part in a job, as `add_job` has added it, for people."""
    said = [f"{part['admitted']} admitted"]
    if part["failed"]:
        said.append(f"{part['failed']} refused or failed" + (f": {part['reason']}" if part.get("reason") else ""))
    if part.get("rounds"):
        said += [
            f"{part['seconds'] / part['rounds']:.3g} s a round",
            f"{bytes_text(part['down_bytes'])} down {bytes_text(part['up_bytes'])} up",
        ]
    return "job: " + ", ".join(said)


def add_job(root: FleetNode, job: Json) -> None:
    """Add to each node its part in a job's rounds, as its fact `job`.

    Of a device: in how many rounds its update was admitted, and refused or failed, with the last `reason`. Of a region,
    and the cloud: the same of all devices that are below it now, and of the rounds in which it has sent a sum the
    `seconds` of its own rounds, and the bytes that it has moved with its devices and the regions below.
    """
    admitted: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    parts: dict[str, Json] = {}
    for outcome in job.get("rounds", ()):
        failed.update(outcome["reasons"].keys())
        reasons |= outcome["reasons"]
        for name, one in outcome.get("regions", {}).items():
            admitted.update(one["admitted"])
            part = parts.setdefault(name, {"rounds": 0, "seconds": 0.0, "up_bytes": 0, "down_bytes": 0})
            part["rounds"] += 1
            for key in ("seconds", "up_bytes", "down_bytes"):
                part[key] += one[key]
    for device in root.devices():
        reason = {"reason": reasons[device.name]} if device.name in reasons else {}
        if admitted[device.name] or failed[device.name]:
            device.facts["job"] = {"admitted": admitted[device.name], "failed": failed[device.name], **reason}
    _add_parts(root, parts)


def _add_parts(node: FleetNode, parts: Mapping[str, Json]) -> None:
    for one in node.children:
        if one.kind != DEVICE:
            _add_parts(one, parts)
    below = [one.facts["job"] for one in node.children if "job" in one.facts]
    if below or node.name in parts:
        counts = {key: sum(one[key] for one in below) for key in ("admitted", "failed")}
        node.facts["job"] = counts | parts.get(node.name, {})
