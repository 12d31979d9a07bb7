"""Predictions on the device, in a separate process, by the Open Inference Protocol.

The two public names are imported on first use, because the agent imports parts of this package but no web framework.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_agent.serving.api import Serving, bind

__all__ = ["Serving", "bind"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'edge_agent.serving' has no attribute {name!r}")
    from edge_agent.serving import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return list(__all__)
