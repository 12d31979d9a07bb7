"""Flower, in both directions. Only this package imports flwr, and only when it is first used.

Unmodified Flower apps on our engine:

    if is_flower_app(folder):  # imports nothing
        app = load_flower_app(folder)
        result = run_flower_app(app, num_supernodes, parse_run_config(["num-server-rounds=5"]), on_round=print)
        result.as_json()  # rounds, final, seconds, clients_per_second, engine, peak_rss_mb, model

On the devices of a fleet instead: `run_on_fleet(app, open_client)`.

Our tasks on their engines: `make_apps(task, config)` returns (ServerApp, ClientApp).
Invariant: nothing that we start sends telemetry.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgefl.flower.apps.app import FlowerApp, is_flower_app, load_flower_app, parse_run_config
    from edgefl.flower.fleet.run import run_on_fleet
    from edgefl.flower.run import FlowerRunResult, run_flower_app
    from edgefl.flower.tasks import make_apps

__all__ = [
    "FlowerApp",
    "FlowerRunResult",
    "is_flower_app",
    "load_flower_app",
    "make_apps",
    "parse_run_config",
    "run_flower_app",
    "run_on_fleet",
]

# Flower reads these when it is imported, so they are set here, before any of our modules imports it.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

_HOMES = {
    "FlowerApp": "edgefl.flower.apps.app",
    "FlowerRunResult": "edgefl.flower.run",
    "is_flower_app": "edgefl.flower.apps.app",
    "load_flower_app": "edgefl.flower.apps.app",
    "make_apps": "edgefl.flower.tasks",
    "parse_run_config": "edgefl.flower.apps.app",
    "run_flower_app": "edgefl.flower.run",
    "run_on_fleet": "edgefl.flower.fleet.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgefl.flower' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
