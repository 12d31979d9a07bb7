"""`edgefl demo`: the whole cycle on this machine, with real processes over TLS.

It starts a cloud with its broker, and agents; trains on digits with skewed labels; compresses to int8 under an
accuracy gate; rolls out a signed release to every agent; and asks each for predictions. This process is the operator.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import httpx

from edgefl.app.commands.progress import round_progress
from edgefl.config import JobConfig, load_config
from edgefl.errors import ConfigError, ParityError, RolloutFailed
from edgefl.local_fleet import LocalFleet
from edgefl.operator.client import CloudClient, Json, load_credentials
from edgefl.operator.publish import export, publish
from edgefl.operator.run import run
from edgefl.task import load_task
from edgefl.terminal.interrupt import ended_by_sigterm
from edgefl.terminal.output import Output, example, json_option
from edgefl.training.local import set_threads

MODEL = "digits"
MAX_DROP = 0.02
NUM_PREDICTIONS = 10
ROLLOUT_S = 60.0
ONLINE_S = 30.0
PREDICT_S = 10.0
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # the devices share this machine's cores


@dataclass(frozen=True, kw_only=True, slots=True)
class _Demo:
    fleet: LocalFleet
    output: Output
    example: Path
    devices: tuple[str, ...]

    def say(self, text: str) -> None:
        self.output.line(text)


@click.command(epilog=example("edgefl demo", "edgefl demo --devices 5 --rounds 10 --json demo.json"))
@click.option("--devices", default=3, show_default=True, type=click.IntRange(1, 32), help="Agents to start.")
@click.option("--rounds", type=click.IntRange(1), help="Number of rounds, instead of the example's own.")
@click.option(
    "--broker", type=click.Choice(["embedded", "builtin", "mosquitto"]), default="embedded", show_default=True
)
@json_option
def demo(devices: int, rounds: int | None, broker: str, output: Output) -> None:
    """Run the whole cycle on this machine.

    A cloud and its devices train, compress, publish, roll out and predict, with real processes over TLS.
    """
    start_s = time.monotonic()
    source = find_example(MODEL)
    config = load_config(JobConfig, source / "config.toml")
    config = replace(
        config, rounds=replace(config.rounds, count=rounds or config.rounds.count, clients=devices, quorum=devices)
    )
    names = tuple(f"device-{number}" for number in range(devices))
    with (
        ended_by_sigterm(),
        tempfile.TemporaryDirectory(prefix="edgefl-demo-") as folder,
        LocalFleet(Path(folder), broker=broker) as fleet,
    ):
        result = _loop(_Demo(fleet=fleet, output=output, example=source, devices=names), config)
    result["seconds"] = time.monotonic() - start_s
    output.line(f"done in {result['seconds']:.0f} s; every process is stopped and the demo's folder removed")
    output.result(result)


def _loop(demo: _Demo, config: JobConfig) -> Json:
    fleet = demo.fleet
    set_threads(1)
    _start(demo)
    demo.say(f"train: {config.rounds.count} rounds of {config.train.algorithm} over {len(demo.devices)} devices")
    parameters = fleet.folder / "model.safetensors"
    with round_progress(demo.output, config.rounds.count) as screen:
        trained = run(
            str(demo.example), cloud=fleet.url, config=config, credentials=fleet.credentials, on_round=screen.on_round,
            out=parameters,
        )  # fmt: skip
    demo.say(f"accuracy on held-out digits: {trained.final['accuracy']:.4f}")
    with CloudClient(fleet.url, load_credentials(fleet.credentials)) as client:
        released = _release(demo, client, parameters)
        predictions = _predict(demo, client)
    return trained.as_json() | {
        "devices": len(demo.devices),
        "model": trained.model | {"path": None, "release": released},
        "predictions": predictions,
    }


def _start(demo: _Demo) -> None:
    fleet, count = demo.fleet, len(demo.devices)
    demo.say("cloud: start (certificate authority, broker, gRPC, HTTPS)")
    fleet.start()
    for number, name in enumerate(demo.devices):
        demo.say(f"{name}: enrol with a one-time token, start the agent")
        fleet.enroll(name)
        data = ("--data", f"part={number}", "--data", f"parts={count}")
        fleet.start_agent(name, *data, env=ONE_THREAD)
    for name in demo.devices:
        fleet.agents[name].wait_for("mqtt.up", ONLINE_S)


def _release(demo: _Demo, client: CloudClient, parameters: Path) -> Json:
    demo.say("compress: ONNX, parity with PyTorch checked, then static int8")
    task = load_task(str(demo.example))
    exported = export(task, parameters, demo.fleet.folder, compression="int8", max_drop=MAX_DROP)
    release = publish(client, MODEL, exported)
    report = release["compression"]
    demo.say(
        f"  {report['source_bytes']} -> {report['target_bytes']} bytes, accuracy {report['accuracy_before']:.4f} -> "
        f"{report['accuracy_after']:.4f} (drop {report['drop']:.4f}, at most {MAX_DROP} allowed)"
    )
    demo.say(f"roll out: {MODEL} version {release['version']}, signed, to all devices")
    rollout = client.start_rollout(MODEL, to=("all",))
    last: Json = {}
    for last in client.rollout_events(rollout["id"], within_s=ROLLOUT_S):
        states = ", ".join(f"{one['device']} {one['state']}" for one in last["devices"])
        demo.say(f"  {states}")
        if last["state"] in {"done", "failed"}:
            break
    if last.get("state") != "done":
        raise RolloutFailed(f"the rollout did not reach every device: {last.get('devices')}")
    return release


def _predict(demo: _Demo, client: CloudClient) -> list[Json]:
    """Send the same digits to every device's endpoint (Open Inference Protocol v2)."""
    task = load_task(str(demo.example))
    if task.test_data is None:
        raise ConfigError(f"task {task.name!r} has no test_data to predict")
    inputs, targets = task.test_data()
    urls = {one["name"]: one["serving_url"] for one in client.devices()}
    labels = [int(label) for label in targets[:NUM_PREDICTIONS]]
    predictions = []
    for name in demo.devices:
        digits = _infer(urls[name], inputs[:NUM_PREDICTIONS])
        right = sum(seen == wanted for seen, wanted in zip(digits, labels, strict=True))
        demo.say(f"{name} at {urls[name]}: digits {digits}, {right} of {NUM_PREDICTIONS} right")
        predictions.append({"device": name, "url": urls[name], "predicted": digits, "labels": labels})
    if len({tuple(one["predicted"]) for one in predictions}) != 1:
        raise ParityError(f"devices differ in their predictions: {predictions}")
    return predictions


def _infer(url: str, inputs: Any) -> list[int]:
    tensor = {
        "name": "input",
        "shape": list(inputs.shape),
        "datatype": "FP32",
        "data": inputs.reshape(-1).tolist(),
    }
    answer = httpx.post(f"{url}/v2/models/{MODEL}/infer", json={"inputs": [tensor]}, timeout=PREDICT_S)
    body: Mapping[str, Any] = answer.json()
    if answer.status_code != httpx.codes.OK:
        raise RolloutFailed(f"{url} answered {answer.status_code}: {body.get('error')}")
    (output,) = body["outputs"]
    rows, classes = output["shape"]
    scores: Sequence[float] = output["data"]
    return [
        max(range(classes), key=lambda digit, row=row: scores[row * classes + digit])  # type: ignore[misc]  # mypy has no types for such defaults
        for row in range(rows)
    ]


def find_example(name: str) -> Path:
    """Return an example's folder, in a checkout or as installed with the package; raises ConfigError."""
    package = Path(__file__).parents[1]
    for folder in (package.parent / "examples" / name, package / "examples" / name):
        if (folder / "pyproject.toml").exists():
            return folder
    raise ConfigError(f"the example {name!r} is neither next to the package nor inside it; install edgefl again")
