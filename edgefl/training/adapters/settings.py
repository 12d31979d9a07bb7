"""Which settings of local training adapters cannot have."""

from __future__ import annotations

from collections.abc import Sized

from edgefl.config import TrainConfig
from edgefl.errors import TaskError


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
    if train.fragments > 1:
        return (
            f"server.fragments={train.fragments}: adapters begin anew in each round, so the change of one does not go "
            "on over several. Leave it out, or freeze the adapters' A: then B is divided like other tensors"
        )
    return ""


def refuse_settings(task: str, adapters: Sized, train: TrainConfig) -> None:
    """Raise TaskError on a device for settings that a job got when it was continued."""
    if adapters and (fault := training_fault(train)):
        raise TaskError(f"task {task!r} trains LoRA adapters, and {fault}")
