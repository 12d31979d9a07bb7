"""Local training on a client's own samples.

`edgefl.task` draws its seeds from here, so the public names, which need it in turn, are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgefl.training.evaluation import evaluate
    from edgefl.training.local import initial_parameters, train_locally

__all__ = ["evaluate", "initial_parameters", "train_locally"]

_MODULES = {
    "evaluate": "edgefl.training.evaluation",
    "initial_parameters": "edgefl.training.local",
    "train_locally": "edgefl.training.local",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'edgefl.training' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
