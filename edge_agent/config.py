"""How to run an agent: its options, checked before anything starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edge_agent.generation.supervisor import GenerationConfig
from edge_agent.link.lease import LeasePolicy
from edge_agent.policy.rules import DevicePolicy, parse_policy
from edge_agent.serving.access import Access
from edge_agent.training.site_network import own_address, require_machines
from edge_agent.training.trainer import IDLE_S
from edgefl.errors import ConfigError, ProtocolError
from edgefl.protocols.inference.placement import AUTO, CLOUD, DEVICE, SPLIT, split_address

MAX_IDLE_S = 86_400.0
MAX_LOAD_S = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentConfig:
    """How to run an agent. Its name and the cloud's addresses are in its home (`Profile`)."""

    home: Path
    data: Mapping[str, str] = field(default_factory=dict)  # options of the task's loaders
    serve_host: str = "127.0.0.1"
    serve_port: int = 8000  # 0 = any free port
    serve_tls: bool = False  # mutual TLS with the device's certificate
    serve_token_file: Path | None = None
    serve_memory_mb: int = 0  # 0 = a third of the machine's
    generation: GenerationConfig | None = None  # a language model's head, instead of a release's
    generate_memory_mb: int = 0  # limit of the generation process; 0 = none
    model_load_s: float = 60.0  # time limit to load a release and run it once
    trainer_memory_mb: int = 0  # 0 = three quarters of the machine's
    trainer_socket: Path | None = None  # of a trainer run by systemd; None = our child process
    trainer_idle_s: float = IDLE_S
    policy: str = ""  # when this device works for the fleet, see `edge_agent.policy.rules`; empty = always
    parents: LeasePolicy = field(default_factory=LeasePolicy)  # when the device changes its parent
    install_dependencies: bool = False  # whether packages that a task needs may be installed, for the trainer only
    placement: str = ""  # of releases that are placed: auto, device, cloud or split:NODE; empty = the release's own
    stages: Sequence[str] = ()  # host:port of stage servers; empty = those that a release names
    site_rendezvous: str = ""  # HOST:PORT of this machine where others join its training; empty = it trains alone
    site_machines: int = 2  # how many train together, if there is a rendezvous

    def __post_init__(self) -> None:
        if not 0 <= self.serve_port <= 65535:
            raise ConfigError(f"--serve-port {self.serve_port} must be in 0..65535")
        self.access()
        self.device_policy()
        for address in self.stages:
            try:
                split_address(address)
            except ProtocolError as cause:
                raise ConfigError(f"--stages: {cause}") from cause
        if self.placement not in {"", AUTO, DEVICE, CLOUD} and not self.placement.startswith(SPLIT):
            raise ConfigError(f"--placement {self.placement!r} is not one of: auto, device, cloud, split:NODE")
        if self.trainer_memory_mb < 0:
            raise ConfigError(f"--trainer-memory-mb {self.trainer_memory_mb} must be 0 (three quarters) or more")
        if not 0 <= self.trainer_idle_s <= MAX_IDLE_S:
            raise ConfigError(f"--trainer-idle-s {self.trainer_idle_s} must be in 0..{MAX_IDLE_S:g}")
        if self.site_rendezvous:
            own_address(self.site_rendezvous, leads=True)
        require_machines(self.site_machines)
        if self.serve_memory_mb < 0:
            raise ConfigError(f"--serve-memory-mb {self.serve_memory_mb} must be 0 (a third) or more")
        if not 0 < self.model_load_s <= MAX_LOAD_S:
            raise ConfigError(f"--model-load-s {self.model_load_s} must be above 0 and at most {MAX_LOAD_S}")

    def device_policy(self) -> DevicePolicy | None:
        """Return the policy, None = the device always works; raises ConfigError for one that cannot be read."""
        return parse_policy(self.policy) if self.policy else None

    def access(self) -> Access:
        """Return who may request predictions; raises ConfigError if the network could, without a token or TLS."""
        return Access(host=self.serve_host, token_file=self.serve_token_file, mutual_tls=self.serve_tls)
