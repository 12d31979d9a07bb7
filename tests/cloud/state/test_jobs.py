import threading

import numpy as np
import pytest

from cloud.jobs.answers import AnswerRow
from cloud.state.blobs import BlobStore
from cloud.state.jobs import Jobs
from cloud.state.store import open_database
from edgefl.config import JobConfig, TrainConfig
from edgefl.errors import ConfigError, MissingExtra, NotFound, ProtocolError
from edgefl.protocols.manifest import Bundle, new_fleet_key, sign, verify
from edgefl.protocols.messages import BlobRef
from edgefl.records import DeviceEvaluation, EvaluationSpec, RoundOutcome
from edgefl.rounds import LastEvaluation
from edgefl.settings.server import ServerConfig


@pytest.fixture
def home(tmp_path):
    engine = open_database(tmp_path / "cloud.db")
    blobs = BlobStore(tmp_path / "blobs")
    key = new_fleet_key()
    yield Jobs(engine, blobs, lambda bundle: sign(bundle, key)), blobs, key
    engine.dispose()


def submit(jobs, blobs, config=None, buffers=()):
    bundle = blobs.put(b"zip")
    parameters = blobs.put_tree({"w": np.zeros(2, np.float32), "steps": np.array(0)})
    return jobs.submit("task:task", bundle, parameters, buffers, config or JobConfig())


def outcome(job, number):
    return RoundOutcome(
        job=job, round=number, parameters={}, admitted=("a", "b"), rejected={"c": "NaN"}, failed={}, missing=(),
        weight=3.0, metrics={"loss": 0.5}, seconds=0.1, up_bytes=8, down_bytes=16,
    )  # fmt: skip


def test_a_submitted_job_can_be_run_as_it_was_given(home):
    jobs, blobs, key = home
    config = JobConfig(train=TrainConfig(lr=0.25), server=ServerConfig(options={"momentum": 0.9}))
    job = submit(jobs, blobs, config, buffers=("steps",))
    row = jobs.load(job)
    assert row.config == config
    assert row.buffers == ("steps",)
    assert (row.rounds_done, row.cohort, row.optimizer_sha256) == (0, (), None)
    bundle = verify(row.bundle, Bundle, key.public_key())
    assert bundle.task == "task:task"
    assert bundle.blob.size == 3
    assert jobs.running() == [job]


def test_what_could_only_fail_in_a_round_is_refused_at_submission(home):
    jobs, blobs, _ = home
    nowhere = BlobRef(sha256="0" * 64, size=1)
    bundle, tree = blobs.put(b"zip"), blobs.put_tree({"w": np.zeros(1, np.float32)})
    with pytest.raises(ConfigError, match=r"parameters 0000.* not in the cloud; upload it"):
        jobs.submit("t:t", bundle, nowhere, (), JobConfig())
    with pytest.raises(ProtocolError, match="tree"):
        jobs.submit("t:t", bundle, blobs.put(b"no tree at all"), (), JobConfig())
    with pytest.raises(ConfigError, match="buffers b are not among"):
        jobs.submit("t:t", bundle, tree, ("b",), JobConfig())
    with pytest.raises((ConfigError, MissingExtra), match="Nonsense"):
        jobs.submit("t:t", bundle, tree, (), JobConfig(server=ServerConfig(optimizer="Nonsense")))
    assert jobs.list() == []


def test_an_open_round_survives_with_its_cohort_and_answers_in_their_order(home):
    jobs, blobs, _ = home
    job = submit(jobs, blobs)
    assert jobs.open_round(job, 1, ("a", "b", "c")) == []
    second = AnswerRow(device="b", file="x/1/b", weight=2.0, metrics={"loss": 1.0})
    first = AnswerRow(device="a", reason="task raised")
    jobs.record(job, 1, second)
    jobs.record(job, 1, first)
    assert jobs.load(job).cohort == ("a", "b", "c")
    assert jobs.open_round(job, 1, ("x",)) == [second, first]
    assert jobs.load(job).cohort == ("a", "b", "c")


def test_a_finished_round_moves_the_job_on_in_one_step(home):
    jobs, blobs, _ = home
    job = submit(jobs, blobs)
    jobs.open_round(job, 1, ("a",))
    jobs.record(job, 1, AnswerRow(device="a", file="f"))
    model = blobs.put(b"model after round 1")
    jobs.finish_round(outcome(job, 1), model, "f" * 64)
    row = jobs.load(job)
    assert (row.rounds_done, row.model, row.optimizer_sha256, row.cohort) == (1, model, "f" * 64, ())
    shown = jobs.get(job)["rounds"]
    assert shown[0]["admitted"] == 2
    assert shown[0]["reasons"] == {"c": "NaN"}
    assert shown[0]["model"] == model.sha256
    assert jobs.open_round(job, 2, ("a",)) == []


def test_waiting_ends_with_a_round_an_end_or_the_timeout(home):
    jobs, blobs, _ = home
    job = submit(jobs, blobs)
    assert not jobs.wait(job, 0, 0.01)
    jobs.open_round(job, 1, ("a",))
    finisher = threading.Timer(0.05, jobs.finish_round, (outcome(job, 1), blobs.put(b"m"), None))
    finisher.start()
    assert jobs.wait(job, 0, 10)
    finisher.join()
    assert not jobs.wait(job, 1, 0.01)
    jobs.end(job, "done")
    assert jobs.wait(job, 1, 0.01)


def test_only_a_running_job_is_cancelled_and_an_unknown_one_is_named(home):
    jobs, blobs, _ = home
    told = []
    jobs.cancelled = told.append
    job = submit(jobs, blobs)
    jobs.cancel(job)
    jobs.cancel(job)
    assert told == [job]
    assert jobs.get(job)["state"] == "cancelled"
    jobs.end(job, "done")
    assert jobs.get(job)["state"] == "cancelled"
    with pytest.raises(NotFound, match="no job 'job-x'"):
        jobs.cancel("job-x")


def test_an_old_rounds_model_is_forgotten_unless_a_job_stands_on_it(home):
    jobs, blobs, _ = home
    job = submit(jobs, blobs)
    models = [blobs.put(b"after round 1"), blobs.put(b"after round 2")]
    for number, model in enumerate(models, 1):
        jobs.open_round(job, number, ("a",))
        jobs.finish_round(outcome(job, number), model, None)
    for number in (-2, 0, 1, 2, 3):
        jobs.forget_model_of(job, number)
    assert [blobs.has(model.sha256) for model in models] == [False, True]


def test_the_optimizers_state_is_forgotten_with_its_rounds_model_unless_a_job_stands_on_it(home):
    jobs, blobs, _ = home
    first, second = submit(jobs, blobs), submit(jobs, blobs)
    states = [blobs.put(b"momentum 1"), blobs.put(b"momentum 2"), blobs.put(b"momentum 3")]
    for job, number, state in ((first, 1, 0), (second, 1, 1), (first, 2, 1), (first, 3, 2), (second, 2, 2)):
        jobs.open_round(job, number, ("a",))
        jobs.finish_round(outcome(job, number), blobs.put(b"m"), states[state].sha256)
    assert all(blobs.has(state.sha256) for state in states)
    for job, number in ((first, 1), (first, 2)):
        jobs.forget_model_of(job, number)
    assert [blobs.has(state.sha256) for state in states] == [False, True, True]  # `second` has the other in round 1
    jobs.forget_model_of(second, 1)
    assert [blobs.has(state.sha256) for state in states] == [False, False, True]


def test_a_request_that_is_sent_again_starts_one_job(home):
    jobs, blobs, _ = home
    started = []
    jobs.started = started.append
    bundle, tree = blobs.put(b"zip"), blobs.put_tree({"w": np.zeros(2, np.float32)})
    first, again, other = (
        jobs.submit("t:t", bundle, tree, (), JobConfig(), key) for key in ("a" * 32, "a" * 32, "b" * 32)
    )
    assert first == again
    assert started == [first, other]


def test_a_running_job_says_what_it_waits_for(home):
    jobs, blobs, _ = home
    job = submit(jobs, blobs)
    assert jobs.get(job)["waiting"] is None
    jobs.waiting = lambda: "waiting for disk space: full"
    assert jobs.list()[0]["waiting"] == "waiting for disk space: full"
    jobs.end(job, "done")
    assert jobs.get(job)["waiting"] is None


def test_a_model_in_parts_is_whole_once_the_job_is_done(home):
    jobs, blobs, _ = home
    moving, frozen = blobs.put_tree({"w": np.zeros(2, np.float32)}), blobs.put_tree({"f": np.ones(3, np.float32)})
    job = jobs.submit("t:t", blobs.put(b"zip"), moving, (), JobConfig(), parted=True, frozen=frozen)
    row = jobs.load(job)
    assert (row.parted, row.frozen, row.model) == (True, frozen, moving)
    assert jobs.get(job)["frozen"] == {"sha256": frozen.sha256, "size": frozen.size}
    jobs.open_round(job, 1, ["a"])
    jobs.finish_round(outcome(job, 1), moving, None)
    assert jobs.rounds_after(job, 0)[0]["frozen"] == frozen.sha256
    whole = blobs.put_tree({"f": np.ones(3, np.float32), "w": np.zeros(2, np.float32)})
    jobs.end(job, "done", model=whole)
    assert jobs.get(job)["model"] == {"sha256": whole.sha256, "size": whole.size}
    assert jobs.get(job)["frozen"] is None
    assert jobs.rounds_after(job, 0)[0]["frozen"] == frozen.sha256  # of that round's model, which is still in parts


def test_a_job_that_is_not_in_parts_has_all_tensors_move(home):
    jobs, blobs, _ = home
    row = jobs.load(submit(jobs, blobs))
    assert (row.parted, row.frozen) == (False, None)


def test_a_tensor_in_both_parts_is_refused(home):
    jobs, blobs, _ = home
    tree = blobs.put_tree({"w": np.zeros(2, np.float32)})
    with pytest.raises(ConfigError, match="tensors w are both"):
        jobs.submit("t:t", blobs.put(b"zip"), tree, (), JobConfig(), parted=True, frozen=tree)
    with pytest.raises(ConfigError, match=r"frozen part 0000.* not in the cloud"):
        jobs.submit("t:t", blobs.put(b"zip"), tree, (), JobConfig(), frozen=BlobRef(sha256="0" * 64, size=1))


def test_the_latest_rounds_are_kept_and_those_that_are_still_read(home):
    jobs, blobs, _ = home
    job, other = submit(jobs, blobs), submit(jobs, blobs)
    model = blobs.put(b"m")

    def finish(numbers, kept=5):
        for number in numbers:
            jobs.open_round(job, number, ("a",))
            jobs.finish_round(outcome(job, number), model, None, kept)
        return [one["round"] for one in jobs.get(job)["rounds"]]

    jobs.open_round(other, 1, ("a",))
    jobs.finish_round(outcome(other, 1), model, None, 5)
    assert finish(range(1, 21)) == [16, 17, 18, 19, 20]
    with jobs.follow(job, 20) as confirm:
        assert finish(range(21, 31)) == list(range(16, 31))
        assert [one["round"] for one in jobs.rounds_after(job, 20, 3)] == [21, 22, 23]
        confirm(30)
        assert finish([31]) == list(range(26, 32))
    assert len(jobs.get(other)["rounds"]) == 1
    assert "rounds" not in jobs.row(job)


def test_evaluated_metrics_are_kept_with_their_round_beside_its_own(home):
    jobs, blobs, _ = home
    job = submit(jobs, blobs)
    for number in (1, 2):
        jobs.open_round(job, number, ("a", "b"))
        jobs.finish_round(outcome(job, number), blobs.put_tree({"w": np.full(2, number)}), None)
    assert jobs.keep_metrics(job, 1, {"accuracy": 0.5, "f1": None})
    assert jobs.keep_metrics(job, 1, {"accuracy": 0.75})  # the last value of a name is kept
    first, second = jobs.get(job)["rounds"]
    assert first["metrics"] == {"loss": 0.5, "accuracy": 0.75, "f1": None}
    assert first["evaluated"] == ["accuracy", "f1"]
    assert (second["metrics"], "evaluated" in second) == ({"loss": 0.5}, False)
    assert jobs.rounds_after(job, 0, 1) == [first]
    assert jobs.list()[0]["metrics"] == {"loss": 0.5}
    jobs.keep_metrics(job, 2, {"loss": 0.25})  # shown in place of the round's own, which stays as it was
    assert jobs.list()[0]["metrics"] == {"loss": 0.25}


def test_metrics_of_a_round_that_is_not_kept_or_not_finished_are_not_stored(home):
    jobs, blobs, _ = home
    job = submit(jobs, blobs)
    assert jobs.list()[0]["metrics"] == {}
    with pytest.raises(NotFound):
        jobs.keep_metrics("job-0", 1, {"a": 1.0})
    for number in (0, 1):
        with pytest.raises(ConfigError, match="has finished 0 rounds"):
            jobs.keep_metrics(job, number, {"a": 1.0})
    for number in (1, 2):
        jobs.open_round(job, number, ("a", "b"))
        jobs.finish_round(outcome(job, number), blobs.put_tree({"w": np.full(2, number)}), None, kept_rounds=1)
    assert jobs.keep_metrics(job, 1, {"a": 1.0}) is False
    with pytest.raises(ConfigError, match="at most 200"):
        jobs.keep_metrics(job, 2, {str(number): 1.0 for number in range(201)})
    assert jobs.get(job)["rounds"][0]["metrics"] == {"loss": 0.5}


def test_a_job_keeps_the_name_that_its_operator_gave_it(home):
    jobs, blobs, _ = home
    parts = blobs.put(b"zip"), blobs.put_tree({"w": np.zeros(1, np.float32)})
    jobs.submit("t:t", *parts, (), JobConfig(), name="digits", label="first try")
    assert [(one["name"], one["label"]) for one in jobs.list()] == [("digits", "first try")]
    with pytest.raises(ConfigError, match="--name"):
        jobs.submit("t:t", *parts, (), JobConfig(), label="job-1")


def test_what_devices_evaluate_is_kept_with_the_job_and_their_last_evaluation_with_its_end(home):
    jobs, blobs, _ = home
    spec = EvaluationSpec(directions={"loss": False, "calls": None})
    bundle, parameters = blobs.put(b"zip"), blobs.put_tree({"w": np.zeros(2, np.float32)})
    job = jobs.submit("t:t", bundle, parameters, (), JobConfig(), evaluation=spec)
    assert jobs.load(job).evaluation == spec
    assert jobs.load(submit(jobs, blobs)).evaluation is None
    found = DeviceEvaluation(metrics={"loss": 0.5}, weight=2.0)
    jobs.open_round(job, 11, ("a", "b"))
    for answer in (AnswerRow(device="a", file="f", evaluation=found), AnswerRow(device="b", reason="why")):
        jobs.record(job, 11, answer)
    assert [one.evaluation for one in jobs.open_round(job, 11, ())] == [found, None]
    assert jobs.load(job).cohort == ("a", "b")
    last = LastEvaluation(metrics={"devices/loss": 0.5}, not_evaluated={"b": "why"})
    jobs.end(job, "done", last=last)
    assert jobs.row(job)["last_evaluation"] == last.as_json()
    assert jobs.get(job)["rounds"] == []
    assert not jobs.has_open_round(job)


def test_a_late_update_is_stored_as_its_own_rounds_and_counts_until_the_next_commit(home):
    jobs, blobs, _ = home
    job = submit(jobs, blobs)
    jobs.open_round(job, 1, ["a", "b"])
    jobs.finish_round(outcome(job, 1), blobs.put_tree({}), None, owed=["b", "c"])
    assert jobs.load(job).owed == ("b", "c")
    jobs.open_round(job, 2, ["a", "b"])
    jobs.record(job, 2, AnswerRow(device="b", file="late", weight=2.0, late=True))
    jobs.record(job, 2, AnswerRow(device="b", file="own", weight=1.0))  # the same device, of this round
    found = jobs.open_round(job, 2, [], with_late=True)
    assert [(one.device, one.file, one.late) for one in found] == [("b", "late", True), ("b", "own", False)]
    assert [one.file for one in jobs.open_round(job, 2, [])] == ["own"]
    with pytest.raises(Exception, match="UNIQUE"):
        jobs.record(job, 2, AnswerRow(device="b", file="again", late=True))
    jobs.finish_round(outcome(job, 2), blobs.put_tree({}), None)
    assert jobs.load(job).owed == ()
    assert jobs.open_round(job, 3, [], with_late=True) == []
