"""The server: FedAvg without evaluation on clients, Flower's shortest round.

Writes a JSON file: when each round ended (monotonic seconds; the first value is the start of round 1), how
many clients answered in each, and this process's peak memory.
"""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    clients, tensors = int(config["clients"]), int(config["tensors"])
    ends_s: list[float] = []
    replies: list[int] = []

    def round_ended(_round: int, _arrays: ArrayRecord) -> None:
        ends_s.append(time.monotonic())

    def count(contents: list[RecordDict], _weight_key: str) -> MetricRecord:
        replies.append(len(contents))
        return MetricRecord({"replies": len(contents)})

    strategy = FedAvg(
        fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients, train_metrics_aggr_fn=count
    )
    strategy.start(
        grid=grid,
        initial_arrays=_model(int(config["model-bytes"]), tensors),
        num_rounds=int(config["rounds"]),
        timeout=float(config["deadline-s"]),
        evaluate_fn=round_ended,
    )
    report = {"ends_s": ends_s, "replies": replies, "peak_rss_kib": _peak_rss_kib()}
    Path(str(config["report"])).write_text(json.dumps(report), encoding="utf-8")


def _model(num_bytes: int, tensors: int) -> ArrayRecord:
    rng = np.random.default_rng(0)
    size = num_bytes // 4 // tensors
    return ArrayRecord({f"w{i}": Array(rng.standard_normal(size, np.float32)) for i in range(tensors)})


def _peak_rss_kib() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
