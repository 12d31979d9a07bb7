"""Which settings of local training adapters cannot have."""

from __future__ import annotations

from edgefl.config import TrainConfig


def training_fault(train: TrainConfig) -> str:
    """Return why adapters cannot be trained with these settings, and what to do instead; empty if they can."""
    if train.algorithm != "fedavg":
        return (
            f"train.algorithm={train.algorithm} sends one gradient: that of A is zero as long as B is, and the mean of "
            "both is not the gradient of their product. Use train.algorithm=fedavg, or freeze the adapters' A"
        )
    if train.keep_optimizer_state:
        return (
            "train.keep_optimizer_state=true: adapters begin anew in each round, so the state is of others. Leave it "
            "out, or freeze the adapters' A, which then stay"
        )
    if train.processes != 1:
        return f"train.processes={train.processes}: adapters are trained by one process. Use train.processes=1"
    return ""
