"""From trained parameters, or an ONNX file, to a release: export, compress under a gate, try, upload, sign.

Invariant: a model is published only if it computes the same as its source (parity), loses no more than allowed by
the task's measure, and runs on its sample as devices will run it; published metrics were measured on the file itself,
or, for an uncompressed file, on the model that it was compared with. Those of a foreign file are measured by a task,
or the publisher's own.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgefl.errors import ConfigError, NotFound, NotMeasurable, ProtocolError
from edgefl.models.compress import parse_max_drop
from edgefl.operator.client import CloudClient, Json
from edgefl.operator.run import download_parameters, upload_file
from edgefl.protocols.manifest import Release, check_model_name, check_same_signature
from edgefl.protocols.messages import BlobRef, from_json
from edgefl.task import Task
from edgefl.terminal.output import counted

if TYPE_CHECKING:
    from edgefl.models.acceptance import Accepted
    from edgefl.trees import Tree

AUTO, MAX_DROP = "auto", "0.02"  # of `edgefl models publish`, unless others are given
COMPRESSIONS = (AUTO, "int8", "none")
BEFORE = "before/"  # begins the names of a release's metrics as they were before compression
ENDED_AS = {"done": "is done", "failed": "failed", "cancelled": "was cancelled", "running": "is still running,",
            "paused": "is paused,"}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """An ONNX file with its metrics and the report of its compression."""

    path: Path
    metrics: Mapping[str, float] = field(default_factory=dict)
    report: Json | None = None
    note: str = ""  # why it is not compressed although it was to be
    accepted: Accepted | None = None  # None = not tried yet; then its sample is made from the declared types
    base: BlobRef | None = None  # the file of which `patch` makes this one
    patch: Path | None = None


def check_request(model: str, max_drop: float | str, *files: Path | None) -> None:
    """Raise ConfigError early for a wrong model name, a wrong `max_drop` or a missing file."""
    check_model_name(model)
    parse_max_drop(max_drop)
    for file in files:
        if file is not None and not file.is_file():
            raise ConfigError(f"{file}: there is no such file; give the path of an existing file")


def refuse_unexportable(task: Task) -> None:
    """Raise TaskError, before the work, for a task of which no ONNX file can be made."""
    from edgefl.models import own_export

    own_export.refuse_unexportable(task)


def refuse_unreachable(client: CloudClient) -> None:
    """Raise CloudUnreachable or CloudRefused before the work for a cloud that does not answer or a wrong token."""
    client.jobs()


def trained_job(client: CloudClient, job: str) -> Json:
    """Return a job whose model was trained for at least one round; raises ConfigError otherwise, or NotFound."""
    found = client.job(client.find_job(job))
    job = found["id"]
    if found["kind"] == "relay":
        raise ConfigError(
            f"{job} carries a Flower app's messages, so the cloud has no model of it; `edgefl run --out` wrote the "
            "model on the machine that ran the app"
        )
    if found["rounds_done"]:
        return found
    if found["state"] in {"running", "paused"}:
        raise ConfigError(
            f"job {job} has not finished a round yet, so its parameters are untrained. Wait for it: edgefl jobs watch "
            f"{job}"
        )
    why = f" ({found['error']})" if found["error"] else ""
    raise ConfigError(
        f"job {job} {ENDED_AS[found['state']]} before its first round was finished{why}, so its parameters are "
        "untrained and nothing is published. Train again with `edgefl run`, or name another job of `edgefl jobs list`"
    )


def what_is_missing(job: Json) -> str:
    """Say which round's model an unfinished job has; empty for a finished job."""
    if job["state"] == "done":
        return ""
    how_far = f"{job['rounds_done']} of {counted(job['config']['rounds']['count'], 'round')}"
    why = f" ({job['error']})" if job["state"] == "failed" else ""
    return (
        f"note: job {job['id']} {ENDED_AS[job['state']]} after {how_far}{why}; this is its model after round "
        f"{job['rounds_done']}"
    )


def parameters_of(client: CloudClient, job: Json, folder: Path) -> Path:
    """Download a job's current parameters."""
    path = folder / "parameters.safetensors"
    download_parameters(client, job, path)
    return path


def export(
    task: Task, parameters: Path, folder: Path, *, compression: str, max_drop: float | str, gate: str | None = None
) -> Exported:  # fmt: skip
    """Make the ONNX file for publishing; raises ConfigError, ParityError and AccuracyGateFailed.

    `compression` "auto" is int8 where that can be judged and is smaller; "int8" is an error elsewhere. `gate` names the
    metric that judges, None = the task's own choice (`edgefl.models.gate`). `max_drop` is absolute, or as a text such
    as "2%" a share of its value before.
    """
    from edgefl.models.export import export_task
    from edgefl.training.evaluation import evaluate
    from edgefl.trees import SpooledTree

    if compression not in COMPRESSIONS:
        raise ConfigError(f"--compress={compression!r} is not one of: {', '.join(COMPRESSIONS)}")
    try:
        tree = SpooledTree(parameters)
    except (OSError, ProtocolError) as cause:
        raise ConfigError(f"{parameters} does not hold parameters in safetensors format: {cause}") from cause
    exported = folder / "model.onnx"
    cases = export_task(task, tree, exported)
    made = _compressed(task, exported, evaluate(task, tree), compression, (max_drop, gate))
    return dataclasses.replace(made, accepted=_accepted(made.path, folder, cases))


def _compressed(
    task: Task, exported: Path, metrics: Mapping[str, float], compression: str, limit: tuple[float | str, str | None]
) -> Exported:
    whole = Exported(path=exported, metrics=metrics)
    if compression == "none":
        return whole
    try:
        compressed = compress_under_gate(task, exported, *limit)
    except NotMeasurable as reason:
        if compression == "int8":
            raise NotMeasurable(f"{reason}; or publish with --compress none") from reason
        return dataclasses.replace(whole, note=f"not compressed: {reason}")
    before, after = exported.stat().st_size, compressed.path.stat().st_size
    if after < before:
        return compressed
    if compression == "int8":
        raise ConfigError(
            f"--compress int8 does not make this model smaller: {after} bytes instead of {before} bytes. It is small, "
            "or most of its weights are in a type or a layer that has no form in int8. Publish with --compress auto or "
            "none"
        )
    return dataclasses.replace(whole, note=f"not compressed: int8 has {after} bytes, not fewer than the {before}")


def publish(client: CloudClient, model: str, exported: Exported, *, new_signature: bool = False) -> Json:
    """Upload and sign; return the release with the compression's report.

    `new_signature` allows other inputs and outputs than those of the version before. Raises SignatureChanged.
    """
    with tempfile.TemporaryDirectory(prefix="edgefl-sample-") as folder:
        accepted = exported.accepted or _accepted(exported.path, Path(folder), [])
        if not new_signature:
            _check_signature(client, model, accepted)
        release = client.publish(
            model, upload_file(client, exported.path), exported.metrics, sample=upload_file(client, accepted.sample),
            inputs=dict(accepted.inputs), outputs=dict(accepted.outputs), new_signature=new_signature,
            **({} if exported.patch is None else {"base": exported.base, "patch": upload_file(client, exported.patch)}),
        )  # fmt: skip
    notes = [note for note in (exported.note, *accepted.notes) if note]
    return release | {"compression": exported.report, "note": "; ".join(notes)}


def measured(
    task: Task, onnx: Path, folder: Path, *, compression: str, max_drop: float | str, gate: str | None = None
) -> Exported:  # fmt: skip
    """Measure an ONNX file made elsewhere with a task's test data and metrics; arguments otherwise as of `export`.

    The file is packed into `folder`, and first tried as a device will try it. Raises ConfigError for a file that
    devices would refuse or that takes or returns something else than the task's model, NotMeasurable for a task
    without model or test data, AccuracyGateFailed.
    """
    from edgefl.models.gate import OtherFile
    from edgefl.models.packing import packed

    file = packed(onnx, folder)
    if file.parent != folder:  # what is made of it stands beside it
        file = Path(shutil.copyfile(file, folder / onnx.name))
    other = OtherFile(task, file)
    whole = _accepted(file, folder, other.cases)
    made = _compressed(task, file, other.measured(), compression, (max_drop, gate))
    accepted = whole if made.path == file else _accepted(made.path, folder, other.cases)
    return dataclasses.replace(made, accepted=accepted)


def publish_onnx(
    client: CloudClient, model: str, path: Path, *, sample: Path | None = None,
    metrics: Mapping[str, float] | None = None, new_signature: bool = False,
) -> Json:  # fmt: skip
    """Publish an ONNX file made elsewhere; raises ConfigError, in words, if a device would refuse it.

    `sample` is an .npz file with one array for each input; without it, inputs are made. `metrics` are the caller's
    own; `measured` has a task measure them.
    """
    from edgefl.models.packing import packed
    from edgefl.models.sample import read_npz

    with tempfile.TemporaryDirectory(prefix="edgefl-onnx-") as name:
        folder = Path(name)
        file = packed(path, folder)
        accepted = _accepted(file, folder, [] if sample is None else [read_npz(sample)])
        exported = Exported(path=file, metrics=metrics or {}, accepted=accepted)
        return publish(client, model, exported, new_signature=new_signature)


def parse_metrics(texts: Sequence[str]) -> dict[str, float]:
    """Return metrics given as NAME=NUMBER; raises ConfigError."""
    metrics: dict[str, float] = {}
    for text in texts:
        name, is_given, value = text.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not name or not is_given or not math.isfinite(number):
            raise ConfigError(f"--metrics {text!r} is not NAME=NUMBER with a finite number, such as accuracy=0.97")
        if name in metrics:
            raise ConfigError(f"--metrics {name} is given twice")
        metrics[name] = number
    return metrics


def _accepted(path: Path, folder: Path, cases: Sequence[Tree]) -> Accepted:
    from edgefl.models.acceptance import accept

    return accept(path, folder / "sample.safetensors", cases)


def _check_signature(client: CloudClient, model: str, accepted: Accepted) -> None:
    """Raise SignatureChanged before the upload; the cloud checks it again when it signs."""
    try:
        newest = client.model(model)[0]
    except NotFound:
        return
    before = from_json(Release, newest)
    check_same_signature(dataclasses.replace(before, inputs=accepted.inputs, outputs=accepted.outputs), before)


def compress_under_gate(task: Task, source: Path, max_drop: float | str, metric: str | None) -> Exported:
    """Return an exported file in int8, with its metrics and those before; arguments and errors as of `export`."""
    from edgefl.models.compress import compress
    from edgefl.models.gate import gate_of

    allowed, relative = parse_max_drop(max_drop)
    gate = gate_of(task, source, metric, relative=relative)
    seen: dict[Path, Mapping[str, float]] = {}

    def evaluate(path: Path) -> float:
        seen[path] = gate.evaluate(path)
        return seen[path][gate.measure.name]

    target = source.with_name("model.int8.onnx")
    report = compress(
        source, target, calibration=gate.calibration, evaluate=evaluate, max_drop=allowed, measure=gate.measure
    )
    before, after = seen.values()
    lost = {
        "accuracy": {"accuracy_drop": report.drop}, "loss": {"loss_rise": report.after - report.before}
    }.get(report.measure, {})  # fmt: skip
    told = {f"{BEFORE}{name}": value for name, value in before.items()}
    return Exported(path=target, metrics={**after, **lost, **told}, report=dataclasses.asdict(report))
