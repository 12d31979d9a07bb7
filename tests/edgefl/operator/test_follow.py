"""Following events over a cloud that goes away: nothing twice, nothing lost, and an end to patience."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from edgefl.config import JobConfig
from edgefl.errors import BlobDamaged, CloudRefused, CloudUnreachable, ConfigError, NotFound, ProtocolError
from edgefl.operator.client import CloudClient, Patience, insist, load_credentials
from edgefl.operator.follow import follow_job, follow_log, follow_relay, follow_rollout
from edgefl.process.log_tail import MAX_RECORDS
from edgefl.records import RoundOutcome
from edgefl.testing import ManualClock


class Streams:
    """A client whose connections are written down: lists of events, an exception at the end."""

    def __init__(self, *connections):
        self.connections = list(connections)
        self.asked = []

    def job_events(self, job, after):
        self.asked.append(after)
        for event in self.connections.pop(0):
            if isinstance(event, Exception):
                raise event
            yield event


GONE = CloudUnreachable("gone")
END = {"state": "done"}


def patience(seconds=10.0):
    clock = ManualClock()
    return Patience(seconds=seconds, clock=clock, pause=clock.advance), clock


def test_a_stream_is_taken_up_after_the_last_round_seen():
    streams = Streams([{"round": 1}, {"heartbeat": True}, GONE], [GONE], [{"round": 2}], [{"round": 3}, END])
    assert list(follow_job(streams, "j", patience=patience()[0])) == [{"round": 1}, {"round": 2}, {"round": 3}, END]
    assert streams.asked == [0, 1, 1, 2]


def test_a_wait_of_the_cloud_is_told_once_and_once_that_it_is_over():
    waits, goes_on = {"heartbeat": True, "waiting": "waiting for disk space"}, {"heartbeat": True, "waiting": None}
    told = []
    streams = Streams([goes_on, waits, waits, GONE], [waits, goes_on, goes_on, {"round": 1}, waits, {"round": 2}, END])
    assert len(list(follow_job(streams, "j", patience=patience()[0], on_waiting=told.append))) == 3
    assert told == ["waiting for disk space", "", "waiting for disk space", ""]


class Logs:
    """A client whose answers about a log are written down."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    def job_log(self, job, num_lines, after):
        self.asked.append((num_lines, after))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_log_is_followed_by_what_is_new_once_a_second_until_the_job_has_ended():
    told = [{"lines": [str(n)], "end": f"1:{n}", "running": n < 3} for n in range(1, 4)]
    client, (one, clock) = Logs(told[0], told[1], GONE, told[2]), patience()
    assert list(follow_log(client, "j", 20, one)) == told
    assert client.asked == [(20, ""), (MAX_RECORDS, "1:1"), (MAX_RECORDS, "1:2"), (MAX_RECORDS, "1:2")]
    assert clock.now_s >= 2
    with pytest.raises(ConfigError, match="too old for --follow"):
        list(follow_log(Logs({"lines": [], "cut": False}), "j", 20, one))


def test_patience_ends_and_says_why():
    one, clock = patience(10.0)
    with pytest.raises(CloudUnreachable, match="gone"):
        list(follow_job(Streams(*[[GONE]] * 50), "j", patience=one))
    assert 5 < clock.now_s <= 10


def test_why_a_call_is_tried_again_is_told_once_for_each_reason():
    told = []
    one = Patience(
        seconds=10, clock=(clock := ManualClock()), pause=clock.advance, on_retry=lambda *said: told.append(said)
    )
    full = CloudRefused("the cloud's disk is full", 503)
    answers = [full, full, GONE, full, "yes"]

    def call():
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return answer

    assert insist(call, one) == "yes"
    assert [reason for reason, _ in told] == [str(full), "gone", str(full)]
    assert told[0][1] == 10 > told[1][1] > told[2][1] > 0
    told.clear()
    streams = Streams([GONE], [GONE], [{"round": 1}, GONE], [{"round": 2}], [END])
    assert len(list(follow_job(streams, "j", patience=one))) == 3
    assert [reason for reason, _ in told] == ["gone", "gone"]  # a stream that only ends is followed by the next


def test_patience_begins_anew_with_each_event():
    one, clock = patience(1.0)
    waits = [[{"heartbeat": True}, GONE], [GONE], [GONE]] * 5
    assert list(follow_job(Streams(*waits, [END]), "j", patience=one)) == [END]
    assert clock.now_s > 1


def test_an_overloaded_cloud_is_tried_again_a_refusal_is_not():
    busy, no = CloudRefused("busy", 503), CloudRefused("no", 401)
    assert list(follow_job(Streams([busy], [END]), "j", patience=patience()[0])) == [END]
    for refusal in (no, NotFound("none")):
        with pytest.raises(type(refusal)):
            list(follow_job(Streams([refusal]), "j", patience=patience()[0]))


def finish(plane, job, number):
    plane.jobs.open_round(job, number, ["a"])
    outcome = RoundOutcome(
        job=job, round=number, parameters={}, admitted=("a",), rejected={}, failed={}, missing=(), weight=1.0,
        metrics={}, seconds=0.1, up_bytes=1, down_bytes=2,
    )  # fmt: skip
    plane.jobs.finish_round(outcome, plane.blobs.put_tree({"w": np.full(1, number, np.float32)}), None)


def test_a_real_cloud_is_restarted_in_between(http_plane):
    parts = [http_plane.blobs.put(b"zip"), http_plane.blobs.put_tree({"w": np.zeros(1, np.float32)})]
    with CloudClient(None, load_credentials(http_plane.credentials)) as client:
        job = client.submit_job("t:t", *parts, (), JobConfig())
        finish(http_plane, job, 1)
        seen = []
        for event in follow_job(client, job, patience=Patience(seconds=20)):
            seen.append(event.get("round", event.get("state")))
            if seen == [1]:
                http_plane.server.stop()
                finish(http_plane, job, 2)
                restart = threading.Timer(0.3, http_plane.server.start)
                restart.start()
            if seen == [1, 2]:
                restart.join()
                http_plane.jobs.end(job, "done")
    assert seen == [1, 2, "done"]


def test_a_rollout_is_followed_until_the_time_is_up(http_plane):
    http_plane.enroll("a")
    http_plane.registry.publish("m", http_plane.blobs.put(b"onnx"), {})
    with CloudClient(None, load_credentials(http_plane.credentials)) as client:
        rollout = client.start_rollout("m")["id"]
        assert [one["state"] for one in follow_rollout(client, rollout, 0.3)] == ["running"]


def test_a_relay_is_followed_over_the_ends_of_its_streams():
    streams = Streams([{"number": 1}, {"heartbeat": True}], [{"number": 1}], [{"number": 2}, END])
    streams.relay_events = lambda relay: streams.job_events(relay, 0)
    heard = list(follow_relay(streams, "relay", patience()[0]))
    assert heard == [{"number": 1}, {"number": 1}, {"number": 2}, END]


def test_to_insist_is_to_ask_until_there_is_an_answer():
    answers = [GONE, CloudRefused("stopping", 503), ProtocolError("half"), BlobDamaged("torn"), "yes"]

    def call():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert insist(call, patience()[0]) == "yes"
    answers[:] = [CloudRefused("no", 400)]
    with pytest.raises(CloudRefused, match="no"):
        insist(call, patience()[0])
    answers[:] = [GONE] * 50
    one, clock = patience(10.0)
    with pytest.raises(CloudUnreachable):
        insist(call, one)
    assert 5 < clock.now_s <= 10
