"""Starts a machine's processes of a training with torchrun's own code, and ends with its parent.

    python -P -m edge_agent.training.site_launcher '{"folder": .., "processes": 2, ..}'

On one machine, the rendezvous is a file in a folder of this user's, and all communication is on the loopback interface:
nothing on the network can take part. For several machines it is torch's `c10d` rendezvous, on the agent's machine.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping

from edge_agent.training.site import INCOMPLETE, SiteSettings
from edge_agent.training.site_network import interface_of
from edgefl.process.children import die_with_parent

MAX_RESTARTS = 10  # then this process ends; for a request, the trainer counts
JOIN_S = 60  # time limit for all machines to come
ALONE_S = 86_400  # between two signs of life in the file of a single machine's rendezvous, which nobody reads


def main() -> None:
    die_with_parent()
    settings = SiteSettings(**json.loads(sys.argv[1]))
    address = settings.address
    os.environ.update(environment_of(settings, address))
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(arguments_of(settings, address))
    except RendezvousError as error:  # also its timeout, and a connection that cannot be made
        sys.stderr.write(f"the site's rendezvous failed: {error}\n")
        sys.exit(INCOMPLETE)


def environment_of(settings: SiteSettings, address: str) -> Mapping[str, str]:
    """Return what the workers inherit; what is set already stays."""
    interface = interface_of(address)
    chosen = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // int(settings.processes))),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # after a restart, the workers get a store without old keys
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # DDP advises against looking for unused parameters, which a task may have
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
    }
    return {name: value for name, value in chosen.items() if name not in os.environ}


def arguments_of(settings: SiteSettings, address: str) -> list[str]:
    """Return torchrun's arguments."""
    if settings.rendezvous:
        endpoint, machines = settings.rendezvous, settings.machines
        conf = f"is_host={int(settings.leads)},join_timeout={JOIN_S},read_timeout={JOIN_S}"
    else:
        endpoint, machines = f"{settings.folder}/rendezvous", 1
        conf = f"store_type=file,keep_alive_interval={ALONE_S}"
    return [
        f"--nnodes={machines}", f"--nproc-per-node={settings.processes}", "--rdzv-backend=c10d", "--rdzv-id=site",
        f"--rdzv-endpoint={endpoint}", f"--rdzv-conf={conf}", f"--local-addr={address}",
        f"--max-restarts={MAX_RESTARTS}", "--monitor-interval=0.1", f"--log-dir={settings.folder}/logs",
        "-m", "edge_agent.training.site_worker", settings.text(),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
