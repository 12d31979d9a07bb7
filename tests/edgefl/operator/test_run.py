"""`edgefl.run` against a real HTTPS plane, with real rounds of real local training behind it."""

from __future__ import annotations

import hashlib
import threading

import numpy as np
import pytest

import edgefl
from edgefl.config import JobConfig, RoundsConfig, TrainConfig
from edgefl.errors import BlobDamaged, CloudRefused, ConfigError, JobCancelled, JobFailed, NotFound
from edgefl.operator.client import CloudClient, Patience, load_credentials
from edgefl.operator.follow import follow_job
from edgefl.operator.run import WatchCallbacks, download, submit, watch
from edgefl.task import load_task
from edgefl.training.evaluation import evaluate
from edgefl.trees import SpooledTree

CONFIG = JobConfig(rounds=RoundsConfig(count=4), train=TrainConfig(lr=0.5))


@pytest.fixture
def client(http_plane):
    with CloudClient(None, load_credentials(http_plane.credentials)) as one:
        yield one


def test_a_run_ends_with_a_model_that_learned(http_plane, trainers, torch_task, tmp_path):
    seen, out = [], tmp_path / "model.safetensors"
    result = edgefl.run(
        str(torch_task), credentials=http_plane.credentials, config=CONFIG, on_round=seen.append, out=out
    )
    assert [one.round for one in seen] == [1, 2, 3, 4]
    assert list(result.rounds) == seen
    assert all(one.metrics.keys() == {"train_loss", "loss", "accuracy"} for one in seen)
    assert result.final["accuracy"] > 0.9
    assert result.model == {"sha256": hashlib.sha256(out.read_bytes()).hexdigest(), "path": str(out)}
    assert result.final.items() >= evaluate(load_task(str(torch_task)), SpooledTree(out)).items()


def test_the_result_has_the_keys_of_the_contract(http_plane, trainers, plain_task):
    result = edgefl.run(str(plain_task), credentials=http_plane.credentials, config=CONFIG).as_json()
    assert result.keys() == {
        "engine", "job", "rounds", "final", "seconds", "clients_per_second", "peak_rss_mb", "model",
    }  # fmt: skip
    assert (result["engine"], result["model"]["path"]) == ("fleet", None)
    assert result["rounds"][0].keys() >= {
        "round", "admitted", "rejected", "seconds", "up_bytes", "down_bytes", "metrics",
    }  # fmt: skip
    assert result["clients_per_second"] == pytest.approx(8 / result["seconds"])
    assert result["peak_rss_mb"] > 20


def test_a_task_without_test_data_keeps_what_its_clients_measured(http_plane, trainers, plain_task, tmp_path):
    out = tmp_path / "m"
    result = edgefl.run(str(plain_task), credentials=http_plane.credentials, config=CONFIG, out=out)
    assert result.final == {"train_loss": 0.5}
    assert SpooledTree(out)["w"].tolist() == [4.0, 4.0]  # a delta of 1 in each of 4 rounds


def test_a_job_that_fails_says_why(http_plane, trainers, plain_task):
    config = JobConfig(rounds=RoundsConfig(count=4, quorum=3))
    with pytest.raises(JobFailed, match="failed after 0 rounds: round 1: 2 clients are available, the quorum is 3"):
        edgefl.run(str(plain_task), credentials=http_plane.credentials, config=config)


def test_a_job_that_is_cancelled_says_after_how_many_rounds(http_plane, trainers, plain_task, client):
    trainers.gate.clear()
    job = submit(client, str(plain_task), load_task(str(plain_task)), CONFIG)
    with pytest.raises(JobCancelled, match="cancelled after 1 rounds"):
        watch(client, job, callbacks=WatchCallbacks(on_round=lambda _: http_plane.jobs.cancel(job)))


def test_a_cloud_that_restarts_is_waited_for(http_plane, trainers, torch_task):
    trainers.gate.clear()

    def restart(outcome):
        if outcome.round == 1:
            http_plane.server.stop()
            trainers.gate.set()
            threading.Timer(0.3, http_plane.server.start).start()

    result = edgefl.run(str(torch_task), credentials=http_plane.credentials, config=CONFIG, on_round=restart)
    assert [one.round for one in result.rounds] == [1, 2, 3, 4]
    assert all("accuracy" in one.metrics for one in result.rounds[1:])


def test_a_model_that_the_cloud_no_longer_keeps_is_not_judged(http_plane, trainers, torch_task, client):
    job = submit(client, str(torch_task), load_task(str(torch_task)), CONFIG)
    trainers.threads[0].join(20)
    first = http_plane.jobs.get(job)["rounds"][0]["model"]
    http_plane.blobs.delete(first)
    result = watch(client, job, load_task(str(torch_task)))
    assert result.rounds[0].metrics.keys() == {"train_loss"}
    assert result.final["accuracy"] > 0.9


def test_the_same_run_gives_the_same_model(http_plane, trainers, torch_task):
    digests = {
        edgefl.run(str(torch_task), credentials=http_plane.credentials, config=CONFIG).model["sha256"] for _ in "ab"
    }
    assert len(digests) == 1


def test_a_task_that_is_none_starts_nothing(http_plane, tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        edgefl.run(str(tmp_path / "none"), credentials=http_plane.credentials)
    assert http_plane.jobs.list() == []


def test_a_download_that_is_not_what_was_asked_leaves_no_file(http_plane, client, tmp_path):
    ref = http_plane.blobs.put(b"right")
    http_plane.blobs.path(ref.sha256).write_bytes(b"wrong")
    with pytest.raises(CloudRefused, match="does not have the hash in its name"):
        download(client, ref.sha256, tmp_path / "x")
    with (
        pytest.raises(BlobDamaged, match="came with SHA-256"),
        OtherBytes(None, load_credentials(http_plane.credentials)) as other,
    ):
        download(other, ref.sha256, tmp_path / "x")
    assert not [one for one in tmp_path.iterdir() if "x" in one.name]


class OtherBytes(CloudClient):
    """A cloud that sends other bytes than were asked for."""

    def get_blob(self, sha256, file):
        file.write(b"wrong")


class Interrupted(CloudClient):
    """A cloud that is not there when its blobs, or a job's row, are first asked for."""

    server = None

    def get_blob(self, sha256, file):
        self.break_off()
        super().get_blob(sha256, file)

    def job(self, job):
        self.break_off()
        return super().job(job)

    def put_blob(self, data, sha256):
        self.break_off()
        return super().put_blob(data, sha256)

    def break_off(self):
        if self.server is not None:
            server, self.server = self.server, None
            server.stop()


def test_uploads_and_the_last_download_are_tried_again_as_patiently_as_a_job_is_followed(
    http_plane, trainers, plain_task, tmp_path
):
    server, credentials = http_plane.server, load_credentials(http_plane.credentials)

    def restart(_seconds):
        if not server._thread.is_alive():
            server.start()

    patience = Patience(pause=restart)
    with Interrupted(None, credentials) as client:
        client.server = server
        job = submit(client, str(plain_task), load_task(str(plain_task)), CONFIG, patience)
        end = list(follow_job(client, job))[-1]
        client.server = server
        result = watch(client, job, out=tmp_path / "model", patience=patience)
    assert client.server is None
    assert SpooledTree(tmp_path / "model")
    assert result.model["sha256"] == end["model"]["sha256"]
    assert len(http_plane.jobs.list()) == 1


def test_parameters_arrive_as_they_were(http_plane, trainers, plain_task, client):
    trainers.plane.jobs.started = lambda _job: None
    job = submit(client, str(plain_task), load_task(str(plain_task)), CONFIG)
    tree = SpooledTree(http_plane.blobs.path(http_plane.jobs.load(job).model.sha256))
    np.testing.assert_array_equal(tree["w"], np.zeros(2, np.float32))


def test_what_is_evaluated_is_kept_with_the_job_in_the_cloud(http_plane, trainers, torch_task, client):
    result = edgefl.run(str(torch_task), credentials=http_plane.credentials, config=CONFIG, name="first try")
    assert [one["metrics"] for one in http_plane.jobs.get(result.job)["rounds"]] == [
        dict(one.metrics) for one in result.rounds
    ]
    assert client.jobs()[0]["metrics"] == result.final
    assert client.find_job("first try") == result.job
    assert watch(client, result.job).final == result.final  # without the task: what an operator measured before


def test_a_metric_that_is_not_finite_is_kept_as_null(http_plane, trainers, plain_task, client):
    job = edgefl.run(str(plain_task), credentials=http_plane.credentials, config=CONFIG).job
    client.keep_metrics(job, 1, {"r2": float("nan"), "f1": 0.5})
    assert http_plane.jobs.get(job)["rounds"][0]["metrics"] == {"train_loss": 0.5, "r2": None, "f1": 0.5}
    first = watch(client, job).rounds[0].metrics
    assert (first["f1"], np.isnan(first["r2"])) == (0.5, True)


class KeepsNone(CloudClient):
    """A cloud from before it kept metrics."""

    def keep_metrics(self, job, number, metrics):
        self._json("PUT", "/v1/not-there", {})


def test_a_cloud_that_cannot_keep_metrics_costs_one_line(http_plane, trainers, torch_task):
    said = []
    with KeepsNone(None, load_credentials(http_plane.credentials)) as client:
        task = load_task(str(torch_task))
        job = submit(client, str(torch_task), task, CONFIG)
        result = watch(client, job, task, WatchCallbacks(on_note=said.append))
    assert result.final["accuracy"] > 0.9
    assert [one[:45] for one in said] == ["the cloud does not keep the evaluated metrics"]


def test_a_name_that_is_none_starts_nothing(http_plane, trainers, plain_task):
    with pytest.raises(ConfigError, match="--name 'job-1'"):
        edgefl.run(str(plain_task), credentials=http_plane.credentials, config=CONFIG, name="job-1")
    assert (http_plane.jobs.list(), list((http_plane.folder / "blobs").iterdir())) == ([], [])


def test_a_word_for_several_jobs_is_told_with_their_ids(http_plane, trainers, plain_task, client):
    jobs = [
        edgefl.run(str(plain_task), credentials=http_plane.credentials, config=CONFIG, name="twice").job for _ in "ab"
    ]
    with pytest.raises(ConfigError, match="'twice' may be any of these jobs") as told:
        client.find_job("twice")
    assert all(job in str(told.value) for job in jobs)
    with pytest.raises(NotFound, match="there is no job 'once'"):
        client.find_job("once")


@pytest.mark.parametrize(
    ("over", "said"),
    [({"server.optimizer": "Nope"}, "server.optimizer='Nope'"), ({"aggregation.rule": "nope"}, "aggregation.rule"),
     ({"server.optimizer": "Adam", "server.options": {"bogus": 1}}, "bogus")],
)  # fmt: skip
def test_what_no_round_could_use_is_refused_before_anything_is_uploaded(http_plane, plain_task, over, said):
    with pytest.raises(ConfigError, match=said):
        edgefl.run(str(plain_task), credentials=http_plane.credentials, set=over)
    assert list((http_plane.folder / "blobs").iterdir()) == []
