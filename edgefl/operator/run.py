"""Run a federated training on a fleet: submit the task, watch its rounds, evaluate each model here.

The cloud runs no user code, so the task's own test data and metrics are applied on the operator's
machine, to each round's model as soon as it is finished. To stop watching does not stop the job.
"""

from __future__ import annotations

import hashlib
import secrets
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import Any

from edgefl.aggregation import refuse_unusable
from edgefl.bundle import pack_bundle
from edgefl.bundle.selection import left_out_text
from edgefl.config import Config, JobConfig, config_of
from edgefl.errors import BlobDamaged, CloudRefused, JobCancelled, JobFailed, MissingExtra, NotFound
from edgefl.measure import peak_rss_mb
from edgefl.operator.client import CloudClient, Json, Patience, insist, load_credentials
from edgefl.operator.follow import follow_job
from edgefl.operator.split import DividedTensors, divided_tensors
from edgefl.protocols.labels import check_label
from edgefl.protocols.messages import BlobRef, Division
from edgefl.records import RoundReport
from edgefl.rounds import LastEvaluation, without_devices
from edgefl.settings.split import LOCAL
from edgefl.task import Task, load_task
from edgefl.training.adapters.exact import refuse_inexact
from edgefl.training.early_stop import with_stop_direction
from edgefl.training.evaluation import Judge
from edgefl.training.local_evaluation import evaluation_spec
from edgefl.training.parts import parts_of
from edgefl.training.steps.client_state import refuse_unkept
from edgefl.trees import SpooledTree, Tree, write_tree
from edgefl.trees.frozen import whole
from edgefl.trees.views import joined

OnRound = Callable[[RoundReport], None]


def _ignore(_said: Any = None) -> None:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchCallbacks:
    """Callbacks while a job is followed."""

    on_round: OnRound = _ignore
    on_waiting: Callable[[str], None] = _ignore  # gets what the cloud waits for; empty when the wait is over
    on_note: Callable[[str], None] = _ignore  # gets what else the operator should know, once


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """The result of a run."""

    job: str
    rounds: tuple[RoundReport, ...]
    final: dict[str, float]  # of the last model: the last round's metrics, and `devices/..` evaluated after it
    seconds: float  # by the cloud's clock
    model: Json  # sha256, and the path if it was downloaded
    last_evaluation: LastEvaluation = field(default_factory=LastEvaluation)  # by the devices, after the last round
    stopped: str = ""  # why `rounds.stop` ended it before its last round

    def as_json(self) -> Json:
        """Return the result with the keys common to all engines."""
        admitted = sum(one.admitted for one in self.rounds)
        return {
            "engine": "fleet",
            "job": self.job,
            "rounds": [one.as_json() for one in self.rounds],
            "final": self.final,
            **({"last_evaluation": last.as_json()} if (last := self.last_evaluation) != LastEvaluation() else {}),
            **({"stopped": self.stopped} if self.stopped else {}),
            "seconds": self.seconds,
            "clients_per_second": admitted / self.seconds if self.seconds > 0 else 0.0,
            "peak_rss_mb": peak_rss_mb(),
            "model": self.model,
        }


def run(  # noqa: PLR0913 - one a thing to choose, all with a default
    task: str, *, cloud: str | None = None, config: Config = None,
    set: Mapping[str, Any] | None = None,  # noqa: A002 - as the command's --set
    credentials: Path | None = None, on_round: OnRound | None = None, out: Path | None = None,
    name: str | None = None,
) -> RunResult:  # fmt: skip
    """Train a task on the fleet of a cloud, from submission to the last model.

    `task` is `package.module:attribute` or a folder. `config` is a configuration, a TOML file's path or a mapping such
    as {"train": {"lr": 0.1}}, which `set`, such as {"train.lr": 0.1}, overrides. `out` is the path for the model
    (safetensors). `name` is a name for the job, for `edgefl jobs`.
    Raises JobFailed, JobCancelled, CloudUnreachable, ConfigError and TaskError.
    """
    chosen, loaded = config_of(JobConfig, config, set), load_task(task)
    with CloudClient(cloud, load_credentials(credentials)) as client:
        job = submit(client, task, loaded, chosen, label=name)
        return watch(client, job, loaded, WatchCallbacks(on_round=on_round or _ignore), out=out)


def submit(  # noqa: PLR0913 - one a thing that may be chosen
    client: CloudClient, reference: str, task: Task, config: JobConfig, patience: Patience | None = None, *,
    label: str | None = None, on_ask: Callable[[], None] = _ignore, on_note: Callable[[str], None] = _ignore,
) -> str:  # fmt: skip
    """Upload a task and its first parameters, start the job and return its id; survives restarts of the cloud.

    `on_ask` is called when all is uploaded: from then on the job may run, even if this process ends. `on_note` gets
    what the operator should know, such as files that are not sent. An unknown aggregation rule or server optimizer, or
    a `label` that is no name for a job, raises ConfigError before anything is uploaded.
    """
    check_label(label)
    with suppress(MissingExtra):  # without torch here, the cloud checks the optimizer
        refuse_unusable(config)
    packed = pack_bundle(reference)
    if packed.left_out:
        on_note(left_out_text(packed.left_out))
    config = with_stop_direction(config, task)
    refuse_inexact(task, config)
    parts = parts_of(task, config.train.seed) if config.train.mode == LOCAL else divided_tensors(task, config.train)
    refuse_unkept(task, config.train, config.server.fragments, parts.moving)
    sha256, key = hashlib.sha256(packed.data).hexdigest(), secrets.token_hex(16)
    bundle = insist(lambda: client.put_blob(packed.data, sha256), patience)
    tree = upload_tree(client, parts.moving, patience)
    others = parts.others if isinstance(parts, DividedTensors) else parts.frozen
    frozen = upload_tree(client, others, patience) if others else None
    division = _uploaded(client, parts, patience) if isinstance(parts, DividedTensors) else None
    evaluation = evaluation_spec(task) if config.rounds.evaluate_every and division is None else None
    on_ask()
    return insist(
        lambda: client.submit_job(packed.task, bundle, tree, parts.buffers, config, key, parted=True, frozen=frozen,
                                  name=packed.name, label=label, evaluation=evaluation, division=division),
        patience,
    )  # fmt: skip


def _uploaded(client: CloudClient, parts: DividedTensors, patience: Patience | None) -> Division:
    """Upload what devices of a job in parts have frozen; return the division."""
    return Division(
        in_cloud=parts.in_cloud, buffers=parts.cloud_buffers,
        device_frozen=upload_tree(client, parts.on_device, patience) if parts.on_device else None,
    )  # fmt: skip


def continue_from(  # noqa: PLR0913 - one a thing that may be chosen
    client: CloudClient, job: str, config: JobConfig, patience: Patience | None = None, *,
    round_number: int | None = None, label: str | None = None, reference: str | None = None, task: Task | None = None,
    on_ask: Callable[[], None] = _ignore, on_note: Callable[[str], None] = _ignore,
) -> str:  # fmt: skip
    """Start a new job from a kept round of another (None = its last), and return its id.

    With a `reference` and its `task`, the code of that task is sent and replaces the job's. Raises ConfigError for a
    round that is not kept, and for settings that do not fit.
    """
    check_label(label)
    if task is not None:
        config = with_stop_direction(config, task)
        refuse_inexact(task, config)
    bundle, name = None, None
    if reference is not None:
        packed = pack_bundle(reference)
        if packed.left_out:
            on_note(left_out_text(packed.left_out))
        sha256, name = hashlib.sha256(packed.data).hexdigest(), packed.task
        bundle = insist(lambda: client.put_blob(packed.data, sha256), patience)
    key = secrets.token_hex(16)
    on_ask()
    return insist(
        lambda: client.continue_job(job, config, key, round_number=round_number, label=label, bundle=bundle, task=name),
        patience,
    )


def watch(
    client: CloudClient, job: str, task: Task | None = None, callbacks: WatchCallbacks | None = None, *,
    out: Path | None = None, patience: Patience | None = None,
) -> RunResult:  # fmt: skip
    """Follow a job to its end, also over restarts of the cloud; raises JobFailed or JobCancelled."""
    callbacks = callbacks or WatchCallbacks()
    judge = JobJudge(client, job, task, patience) if task is not None else None
    keeper = MetricsKeeper(client, job, patience, callbacks.on_note)
    rounds: list[RoundReport] = []
    end: Json = {}
    for event in follow_job(client, job, patience=patience, on_waiting=callbacks.on_waiting):
        if "state" in event:
            end = event
            continue
        outcome = RoundReport.from_json(event)
        judged = judge(outcome) if judge is not None else {}
        keeper.keep(outcome.round, judged)
        rounds.append(replace(outcome, metrics={**outcome.metrics, **judged}))
        callbacks.on_round(rounds[-1])
    if end["state"] == "cancelled":
        raise JobCancelled(f"job {job} was cancelled after {len(rounds)} rounds")
    if end["state"] != "done":
        raise JobFailed(f"job {job} failed after {len(rounds)} rounds: {end['error']}")
    model = {"sha256": end["model"]["sha256"], "path": str(out) if out is not None else None}
    if out is not None:
        insist(lambda: download(client, model["sha256"], out), patience)
    times = insist(lambda: client.job(job), patience)
    last = LastEvaluation.from_json(end.get("last_evaluation") or {})
    return RunResult(
        job=job,
        rounds=tuple(rounds),
        final={**without_devices(rounds[-1].metrics), **last.metrics} if rounds else {},
        last_evaluation=last,
        stopped=end.get("stopped") or "",
        seconds=float(times["ended_s"]) - float(times["created_s"]),
        model=model,
    )


class MetricsKeeper:
    """Stores what is evaluated here with the job's rounds in the cloud; a cloud that refuses is told once."""

    def __init__(
        self, client: CloudClient, job: str, patience: Patience | None = None, tell: Callable[[str], None] = _ignore
    ) -> None:
        self._client, self._job, self._patience, self._tell = client, job, patience, tell
        self._refused = False

    def keep(self, number: int, metrics: Mapping[str, float]) -> None:
        """Store a round's metrics, if there are any; raises CloudUnreachable when patience ends."""
        if not metrics or self._refused:
            return
        try:
            insist(lambda: self._client.keep_metrics(self._job, number, metrics), self._patience)
        except (NotFound, CloudRefused) as error:
            self._refused = True
            self._tell(f"the cloud does not keep the evaluated metrics: {error}. An older cloud cannot; update it")


class JobJudge:
    """Evaluates the models of a job on the task's test data, in this process; returns no metrics if there is none."""

    def __init__(self, client: CloudClient, job: str, task: Task, patience: Patience | None = None) -> None:
        self._client, self._patience = client, patience
        config = insist(lambda: client.job(job), patience)["config"]
        self._judge = Judge(task, workers=config.get("train", {}).get("workers", 0))
        self._frozen: tuple[str, Tree] | None = None  # the last one, with its digest

    def __call__(self, outcome: RoundReport) -> dict[str, float]:
        """Return `loss` and the task's metrics after a round; empty for a model that the cloud no longer keeps."""
        if not self._judge.can or outcome.model is None:
            return {}
        frozen = outcome.frozen
        try:
            moving = self._tree(outcome.model)
            if frozen is not None and (self._frozen is None or self._frozen[0] != frozen):  # one for all rounds
                self._frozen = frozen, self._tree(frozen)
        except NotFound:
            return {}
        return self._judge(whole(moving, None if frozen is None or self._frozen is None else self._frozen[1]))

    def _tree(self, sha256: str) -> Tree:
        with tempfile.TemporaryDirectory(prefix="edgefl-") as folder:
            path = Path(folder) / "tree"
            insist(lambda: download(self._client, sha256, path), self._patience)
            return dict(SpooledTree(path))  # memory-mapped: the file may be deleted


def download(client: CloudClient, sha256: str, path: Path) -> None:
    """Download a blob into a file, completely or not at all; raises BlobDamaged if the digest does not match."""
    partial = path.with_name(f".{path.name}.part")
    try:
        with partial.open("w+b") as file:
            client.get_blob(sha256, file)
            file.seek(0)
            seen = hashlib.file_digest(file, "sha256").hexdigest()
        if seen != sha256:
            raise BlobDamaged(f"blob {sha256[:16]}... came with SHA-256 {seen[:16]}...; try again")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def download_parameters(client: CloudClient, job: Json, path: Path) -> None:
    """Download all of a job's current parameters into a file; while it runs, frozen tensors come from a second blob."""
    download(client, job["model"]["sha256"], path)
    if job.get("frozen") is None:
        return
    with tempfile.TemporaryDirectory(prefix=".edgefl-", dir=path.parent) as folder:
        frozen, both = Path(folder) / "frozen", Path(folder) / "whole"
        download(client, job["frozen"]["sha256"], frozen)
        with both.open("wb") as file:
            write_tree(joined(SpooledTree(frozen), SpooledTree(path)), file)
        both.replace(path)


def upload_tree(client: CloudClient, tree: Tree, patience: Patience | None = None) -> BlobRef:
    """Upload parameters without copying them in memory."""
    with tempfile.TemporaryFile(prefix="edgefl-") as file:
        write_tree(tree, file)
        file.seek(0)
        return _upload(client, file, patience)


def upload_file(client: CloudClient, path: Path) -> BlobRef:
    """Upload a file."""
    with path.open("rb") as file:
        return _upload(client, file)


def _upload(client: CloudClient, file: BufferedReader | BufferedRandom, patience: Patience | None = None) -> BlobRef:
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()

    def from_its_beginning() -> BlobRef:
        file.seek(0)
        return client.put_blob(file, sha256)

    return insist(from_its_beginning, patience)
