"""The fleet of a simulation: which nodes there are, and their enrolled homes, made once and copied for each seed.

Keys and certificates are made by the programs' own code. A fleet is flat, or has regions, also one below another.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cloud.region.server.enrolment import FILE as REGION_FILE
from cloud.region.server.enrolment import RegionProfile
from cloud.state.enrolment import DEVICE, REGION
from cloud.state.home import AggregatorOptions, CloudHome
from edge_agent.link.profile import Profile, save_profile
from edgefl.process.home import create_home, replace_file
from edgefl.protocols import tls

CLOUD = "cloud"
HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Topology:
    """Who is below whom: region or device -> its parent."""

    name: str
    regions: Mapping[str, str]
    devices: Mapping[str, str]

    def ports(self, node: str) -> tuple[int, int, int]:
        """Return the ports of the cloud or a region for gRPC, HTTPS and MQTT."""
        at = 9000 + 10 * [CLOUD, *self.regions].index(node)
        return at, at + 1, at + 2

    @property
    def servers(self) -> list[str]:
        return [CLOUD, *self.regions]


FLAT = Topology("flat", {}, {f"d{number}": CLOUD for number in range(4)})
TIERS = Topology(
    "regions", {"r1": CLOUD, "r2": CLOUD}, {f"d{number}": f"r{1 + number // 3}" for number in range(6)}
)  # fmt: skip
DEEP = Topology(
    "region below a region",
    {"r1": CLOUD, "r2": "r1"},
    {"d0": CLOUD, "d1": "r1", "d2": "r1", "d3": "r2", "d4": "r2"},
)
TOPOLOGIES: Mapping[str, Topology] = {one.name: one for one in (FLAT, TIERS, DEEP)}


def first_parameters() -> dict[str, np.ndarray]:
    """Return the parameters before the first round, of two precisions."""
    return {"b": np.zeros(3, np.float32), "w": np.zeros(17, np.float64)}


def bundle() -> bytes:
    """Return a task's bundle; nobody runs it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("task.py"), "task = None\n")
    return file.getvalue()


def cloud_options(topology: Topology, home: Path) -> AggregatorOptions:
    """Return how the cloud is started."""
    grpc_port, http_port, mqtt_port = topology.ports(CLOUD)
    return AggregatorOptions(
        home=home, host=HOST, grpc_port=grpc_port, http_port=http_port, mqtt_port=mqtt_port, broker="builtin",
        kept_models=1000,
    )  # fmt: skip


def make_homes(topology: Topology, folder: Path) -> None:
    """Make the enrolled homes of all nodes, each in a folder of its name."""
    home = CloudHome(cloud_options(topology, folder / CLOUD))
    with home:
        for names, role in ((topology.regions, REGION), (topology.devices, DEVICE)):
            for name, parent in names.items():
                (_region if role == REGION else _device)(topology, home, folder / name, name, parent)


def _apply(home: CloudHome, name: str, parent: str, role: str, folder: Path) -> None:
    """Enrol a member with the files of its identity in a folder."""
    identity = tls.Identity.in_folder(folder)
    shutil.copy(home.identity.ca, identity.ca)
    secret, _ = tls.parse_token(home.enrolment.new_token(role=role))
    request = tls.new_request(identity, name)
    identity.cert.write_bytes(home.enrolment.enroll(secret, name, {}, request, role=role, parent=parent))


def _device(topology: Topology, home: CloudHome, folder: Path, name: str, parent: str) -> None:
    create_home(folder, "agent")
    _apply(home, name, parent, DEVICE, folder)
    (folder / "fleet.pub").write_bytes(home.services().fleet_key_pem)
    grpc_port, http_port, mqtt_port = topology.ports(parent)
    profile = Profile(
        device=name, cloud_url=f"https://{HOST}:{http_port}", grpc=f"{HOST}:{grpc_port}",
        broker=f"mqtts://{HOST}:{mqtt_port}", region="" if parent == CLOUD else parent,
    )  # fmt: skip
    save_profile(folder, profile)


def _region(topology: Topology, home: CloudHome, folder: Path, name: str, parent: str) -> None:
    create_home(folder, "region")
    (folder / "tls").mkdir(mode=0o700)
    _apply(home, name, parent, REGION, folder / "tls")
    (folder / "fleet.pub").write_bytes(home.services().fleet_key_pem)
    grpc_port, http_port, _ = topology.ports(parent)
    profile = RegionProfile(
        name=name, parent_url=f"https://{HOST}:{http_port}", parent_grpc=f"{HOST}:{grpc_port}", parent_name=parent
    )
    replace_file(folder / REGION_FILE, json.dumps(dataclasses.asdict(profile)).encode())
