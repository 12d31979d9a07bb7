"""A Flower app, unmodified, from its folder: in Flower's own engine (Ray), or in edgefl's.

    python -m benchmarks.simulation_rivals.flower_folder FOLDER --engine flower --nodes 100 --rounds 5

A round lasts from its first message to that of the next, evaluation included: edgefl says so itself, for
Flower it is what the app's strategy logs. Flower is called where its
`flwr-simulation` process calls it, without the SuperLink around it, which would only cost it time.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Mapping
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.simulation_rivals.common import quiet

ACTORS = 2


class _Rounds(logging.Handler):
    """Records when the strategy logs the start of a round, and the end of the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.at_s: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        if said.startswith(("[ROUND", "Strategy execution finished")):
            self.at_s.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--engine", choices=("flower", "edgefl"), required=True)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--settings", type=json.loads, default={}, help="run-config, as JSON")
    parser.add_argument("--arrays", type=Path, help="file for the last arrays (.npz)")
    given = parser.parse_args()
    quiet()
    settings = {**given.settings, "num-server-rounds": given.rounds}
    arrays, said = _ENGINES[given.engine](given.folder.resolve(), given.nodes, settings)
    if given.arrays:
        np.savez(given.arrays, *arrays.to_numpy_ndarrays())
    print(json.dumps(said), flush=True)


def _in_flower(folder: Path, nodes: int, settings: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    import secrets

    from flwr.app import Context, RecordDict
    from flwr.app.user_config import UserConfig
    from flwr.common.config import get_fused_config_from_dir, get_project_config
    from flwr.simulation.run_simulation import _run_simulation
    from flwr.supercore.constant import NOOP_FEDERATION_ID
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.supercore.telemetry import EventType

    components = get_project_config(folder)["tool"]["flwr"]["app"]["components"]
    override = UserConfig(settings)
    run = Run.create_empty(run_id=secrets.randbits(62))
    run.primary_task_id, run.federation_id, run.override_config = secrets.randbits(62), NOOP_FEDERATION_ID, override
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = run.primary_task_id, run.run_id, 1
    context = Context(
        run_id=run.run_id,
        node_id=1,
        node_config=UserConfig(),
        state=RecordDict(),
        run_config=get_fused_config_from_dir(folder, override),
    )
    rounds = _Rounds()
    logging.getLogger("flwr").addHandler(rounds)
    result = _run_simulation(
        num_supernodes=nodes,
        exit_event=EventType.FLWR_SIMULATION_RUN_LEAVE,
        client_app_attr=components["clientapp"],
        server_app_attr=components["serverapp"],
        server_app_context=context,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": ACTORS, "num_gpus": 0},
        },
        app_dir=str(folder),
        run=run,
        is_app=True,
    )
    seconds = [after - before for before, after in pairwise(rounds.at_s)]
    detail = {"flwr": version("flwr"), "ray": version("ray")}
    return result.context.state["arrays"], {"round_s": seconds, "accuracy": None, "detail": detail}


def _in_edgefl(folder: Path, nodes: int, settings: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    from edgefl.flower import load_flower_app, run_flower_app

    result = run_flower_app(load_flower_app(folder), nodes, dict(settings))
    seconds = [one.seconds for one in result.rounds]
    detail = {"edgefl": version("edgefl-fleet"), "workers": result.num_workers}
    return result.arrays, {"round_s": seconds, "accuracy": result.final.get("accuracy"), "detail": detail}


_ENGINES = {"flower": _in_flower, "edgefl": _in_edgefl}


if __name__ == "__main__":
    main()
