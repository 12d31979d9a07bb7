"""The settings of `[train.split]`: where a model is cut, what crosses, and who trains which part.

SplitFed (Thapa et al. 2022): the device trains the layers up to the cut on its raw data, the cloud the rest. With a
second cut the last layers and the targets stay on the device, too (the U-shape of Vepakomma et al. 2018).
"""

from __future__ import annotations

from dataclasses import dataclass

from edgefl.errors import ConfigError
from edgefl.terminal.bounds import require, require_above_zero, require_printable, require_within

LOCAL, SPLIT = "local", "split"
MODES = (LOCAL, SPLIT)
PER_DEVICE, SHARED = "per-device", "shared"
TRAINED, FROZEN = "trained", "frozen"
RETURNED, AUXILIARY = "returned", "auxiliary"
TRAINED_FORMATS = ("fp32", "fp16", "bf16")
CACHED_FORMATS = (*TRAINED_FORMATS, "int8")  # int8 for what is never differentiated
MAX_MICRO_BATCHES = 256
MAX_CHECKPOINT_STEPS = 1_000_000
_MAX_PORT = 65_535


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitConfig:
    """How a model is trained in parts, on the device and in the cloud."""

    cut: str = ""  # the device's last layer: a module such as layer2, a node of the traced graph, or a number of blocks
    last_cut: str = ""  # the cloud's last layer: what follows, and the targets, stay on the device; empty = nothing
    server: str = ""  # HOST:PORT of `edgefl cloud train-stage`, as devices reach it
    wire: str = "fp32"  # of what crosses the cut: fp32 | fp16 | bf16; with a frozen device part also int8
    micro_batches: int = 1  # into so many a batch is cut, so that device, link and cloud work at the same time
    cloud_part: str = "per-device"  # per-device: averaged after each round, as the device's | shared: one for all
    device_part: str = "trained"  # trained | frozen: its activations are sent once and kept in the cloud
    gradients: str = "returned"  # returned: from the cloud | auxiliary: the device has its own loss, nothing returns
    checkpoint_steps: int = 20  # after so many steps both sides keep their state, to continue from
    answer_s: float = 120.0  # how long the device waits for an answer, and for the cloud to be reached again

    def __post_init__(self) -> None:
        for name in ("cut", "last_cut"):
            require_printable(f"train.split.{name}", getattr(self, name) or "-")
        for name, known in (
            ("cloud_part", (PER_DEVICE, SHARED)),
            ("device_part", (TRAINED, FROZEN)),
            ("gradients", (RETURNED, AUXILIARY)),
            ("wire", CACHED_FORMATS if self.sends_once else TRAINED_FORMATS),
        ):
            value = getattr(self, name)
            require(value in known, f"train.split.{name}={value!r} is not one of: {', '.join(known)}")
        require_within("train.split.micro_batches", self.micro_batches, 1, MAX_MICRO_BATCHES)
        require_within("train.split.checkpoint_steps", self.checkpoint_steps, 1, MAX_CHECKPOINT_STEPS)
        require_above_zero("train.split.answer_s", self.answer_s, 86_400.0)
        if self.server:
            self._check_server()
        self._check_together()

    @property
    def is_set(self) -> bool:
        """Whether the table says where to cut."""
        return bool(self.cut or self.server)

    @property
    def sends_once(self) -> bool:
        """Whether activations are sent once and kept: the device has no layer that is trained."""
        return self.device_part == FROZEN and not self.last_cut

    @property
    def returns_gradients(self) -> bool:
        """Whether the cloud sends gradients of what crossed the first cut."""
        return self.device_part == TRAINED and self.gradients == RETURNED

    @property
    def keeps_state(self) -> bool:
        """Whether a device keeps something between rounds: the head of its own loss."""
        return self.gradients == AUXILIARY

    def require_complete(self) -> None:
        """Raise ConfigError if a job in parts could not begin."""
        require(bool(self.cut), "train.mode='split' needs train.split.cut: the device's last layer")
        require(
            bool(self.server), "train.mode='split' needs train.split.server: HOST:PORT of `edgefl cloud train-stage`"
        )

    def _check_server(self) -> None:
        host, colon, port = self.server.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) <= _MAX_PORT and self.server.isprintable()):
            raise ConfigError(
                f"train.split.server={self.server[:200]!r} is not HOST:PORT, such as cloud.example.org:9470"
            )

    def _check_together(self) -> None:
        require(
            self.cloud_part == PER_DEVICE or not self.last_cut,
            f"train.split.cloud_part={SHARED!r} and last_cut={self.last_cut!r}: the shared part would change between a "
            "micro-batch's two passes. Use per-device",
        )
        if self.gradients == AUXILIARY:
            require(
                not self.last_cut,
                f"train.split.gradients={AUXILIARY!r} and last_cut={self.last_cut!r}: with a last part on the device "
                "the cloud needs its gradients. Leave one out",
            )
            require(
                self.device_part == TRAINED,
                f"train.split.gradients={AUXILIARY!r}: a frozen device part has no loss of its own. Leave it out",
            )


def check_mode(mode: str, split: SplitConfig, algorithm: str, processes: int | str) -> None:
    """Raise ConfigError for a mode of training that other settings do not fit."""
    require(mode in MODES, f"train.mode={mode!r} is not one of: {', '.join(MODES)}")
    if mode != SPLIT:
        require(not split.is_set, f"train.split is set, but train.mode={mode!r}; add train.mode={SPLIT!r}")
        return
    require(algorithm == "fedavg", f"train.mode={SPLIT!r} needs train.algorithm=fedavg: it takes local steps")
    require(processes == 1, f"train.mode={SPLIT!r} needs train.processes=1: one process has the device's part")
