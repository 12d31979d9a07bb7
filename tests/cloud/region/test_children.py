"""What regions are told and what they say, over a real stream: reconnects, moves in mid-round, strangers."""

from __future__ import annotations

import hashlib
import json
import queue
import time

import pytest
from blake3 import blake3

from cloud.dataplane.open_round import OpenRound, Surroundings
from cloud.jobs.answers import AnswerRow
from cloud.region.children import LEAD_S
from cloud.region.server.uplink import SumFile
from edgefl.exchange import Terms
from edgefl.protocols import tiers as protocol
from edgefl.protocols.messages import BlobRef, Deliver, DeviceState, LogWanted, RoundClosed, Signed, encode
from edgefl.protocols.tiers import LogSent, Member, Message, MessageReply, RegionState, Work

WAIT_S = 30.0
STATE = RegionState(version="1", parent="cloud", host="h", grpc_port=1, http_port=2, mqtt_port=3)
ONLINE = encode(DeviceState(session=1, online=True, agent_version="1"))


class Heard:
    """The entries that a region has been told, as they are now."""

    def __init__(self):
        self.entries, self._changes = {}, queue.SimpleQueue()

    def __call__(self, key, value):
        self._changes.put((key, value))

    def until(self, predicate):
        """Take changes until the entries are as expected; return them."""
        end_s = time.monotonic() + WAIT_S
        while not predicate(self.entries):
            key, value = self._changes.get(timeout=max(0.0, end_s - time.monotonic()))
            if value is None:
                self.entries.pop(key, None)
            else:
                self.entries[key] = value
        return self.entries

    def work(self, key, devices):
        """Wait until the region's work for a round has these devices; return it."""

        def is_so(entries):
            return key in entries and protocol.unpack(Work, entries[key]).devices == devices

        return protocol.unpack(Work, self.until(is_so)[key])


@pytest.fixture
def r1(tiers):
    heard = Heard()
    heard.uplink = tiers.uplink("r1", heard)
    heard.until(lambda entries: "running" in entries and "revoked" in entries)
    heard.key = f"work/{tiers.job}/1"
    return heard


def ask(tiers, opened, region, *devices):
    for device in devices:
        tiers.children.send_job(region, device, opened.assignment)


def test_a_region_knows_its_members_its_jobs_and_what_is_revoked(tiers, r1):
    members = {key: protocol.unpack(Member, value) for key, value in r1.entries.items() if key.startswith("member/")}
    assert members.keys() == {"member/a", "member/b"}
    assert members["member/a"] == tiers.members.members()["a"]
    assert json.loads(r1.entries["running"]) == [tiers.job]
    assert r1.entries["revoked"].startswith(b"-----BEGIN X509 CRL")
    tiers.enrolment.remove("a")
    tiers.members.note_change()
    revoked = r1.entries["revoked"]
    r1.until(lambda entries: "member/a" not in entries and entries["revoked"] != revoked)
    tiers.members.assign("c", ["r1", "r2"])
    r1.until(lambda entries: "member/c" in entries)


def test_the_regions_below_a_region_are_told_to_it(tiers):
    heard = Heard()
    tiers.uplink("r2", heard)
    entries = heard.until(lambda entries: "revoked" in entries)
    assert {key for key in entries if key.startswith("member/")} == {"member/c", "member/d", "member/r2a"}


def test_work_is_told_device_by_device_and_ends(tiers, r1):
    opened = tiers.open(deadline_s=100.0)
    ask(tiers, opened, "r1", "a")
    work = r1.work(r1.key, ["a"])
    assert 80 < work.assignment.deadline_s < 100 - LEAD_S
    assert (work.fit.model, work.offline_grace_s) == (opened.assignment.model, 5.0)
    ask(tiers, opened, "r1", "b")
    r1.work(r1.key, ["a", "b"])
    tiers.children.send_job("r1", "a", RoundClosed(job=tiers.job, round=1, job_ended=False))
    r1.work(r1.key, ["b"])
    tiers.children.close_round(tiers.job, 1)
    r1.until(lambda entries: r1.key not in entries)


def test_between_two_times_of_asking_the_regions_below_keep_what_they_have(tiers, r1):
    """If the round were over for them, they would delete answers that were acknowledged."""
    opened = tiers.open()
    ask(tiers, opened, "r1", "a", "b")
    r1.work(r1.key, ["a", "b"])
    tiers.paused.add((tiers.job, 1))
    tiers.rounds.remove(opened)
    tiers.children.withdraw("a", tiers.job, 1)
    assert r1.work(r1.key, []).assignment.job == tiers.job
    again = tiers.open()
    ask(tiers, again, "r1", "b")
    r1.work(r1.key, ["b"])
    tiers.paused.clear()
    tiers.rounds.remove(again)
    tiers.children.withdraw("b", tiers.job, 1)
    r1.until(lambda entries: r1.key not in entries)


def test_a_round_with_no_time_left_is_told_all_the_same(tiers, r1):
    opened = tiers.open(deadline_s=0.9)
    ask(tiers, opened, "r1", "a")
    assert r1.work(r1.key, ["a"]).assignment.deadline_s == 0.0


def test_a_job_is_told_before_its_work(tiers, r1):
    """A region that does not know a job takes it for ended, and its devices would stop."""
    former, tiers.job = (
        tiers.job,
        tiers.jobs.submit(
            "t:t", tiers.blobs.put(b"zip"), tiers.jobs.load(tiers.job).model, (), tiers.jobs.load(tiers.job).config
        ),
    )
    opened = tiers.open()
    ask(tiers, opened, "r1", "a")
    entries = r1.until(lambda entries: f"work/{tiers.job}/1" in entries)
    assert json.loads(entries["running"]) == sorted([former, tiers.job])


def test_a_region_that_reconnects_is_told_all_again(tiers, r1):
    opened = tiers.open()
    ask(tiers, opened, "r1", "a", "b")
    r1.work(r1.key, ["a", "b"])
    tiers.stop()
    tiers.start()
    tiers.children.withdraw("a", tiers.job, 1)
    r1.work(r1.key, ["b"])


def test_a_parent_that_starts_again_says_which_rounds_wait_for_the_region(tiers, r1):
    """Also if none of its devices is online: it may have their answers."""
    tiers.drop()
    opened = tiers.open()
    opened.accept_all([], lambda _rows: None)
    again = Heard()
    tiers.uplink("r1", again)
    assert again.work(r1.key, []).assignment.job == tiers.job


def test_a_device_that_moves_in_mid_round_is_asked_where_it_is(tiers, r1):
    tiers.members.assign("b", ["r1", "r2"])
    other = Heard()
    tiers.uplink("r2", other)
    opened = tiers.open()
    ask(tiers, opened, "r1", "a", "b")
    r1.work(r1.key, ["a", "b"])
    tiers.children.moved("b", "r2")
    r1.work(r1.key, ["a"])
    other.work(r1.key, ["b"])
    tiers.children.moved("b", "")  # it speaks to the cloud itself
    other.work(r1.key, [])
    tiers.children.moved("b", "r1")
    r1.work(r1.key, ["a", "b"])
    tiers.children.moved("b", "r1")  # twice changes nothing
    r1.work(r1.key, ["a", "b"])


def test_a_device_that_cannot_answer_through_its_new_parent_is_not_asked_there(tiers, r1):
    opened = tiers.open()
    opened.unreachable = lambda region: f"region {region} sends sums" if region else ""
    tiers.children.moved("b", "r1")
    r1.uplink.mirror.set("state/a", ONLINE)  # whatever comes next is no work
    ask(tiers, opened, "r1", "a")
    r1.work(r1.key, ["a"])


def test_a_region_is_not_asked_any_more_for_a_device_that_is_not_below_it(tiers, r1):
    opened = tiers.open()
    ask(tiers, opened, "r1", "a", "b")
    r1.work(r1.key, ["a", "b"])
    tiers.members.assign("b", ["r2"])
    r1.work(r1.key, ["a"])


def test_a_region_is_not_asked_for_what_a_device_has_answered_elsewhere(tiers, r1):
    """It would wait for it until the deadline. The device's update may come before the news that it has moved."""
    opened = tiers.open()
    ask(tiers, opened, "r1", "a", "b")
    r1.work(r1.key, ["a", "b"])
    assert opened.accept(AnswerRow(device="b", reason="none"), lambda _answer: None)
    ask(tiers, opened, "r1", "a")  # something is told again, such as after the region's restart
    r1.work(r1.key, ["a"])


def test_what_devices_say_is_heard_until_their_region_is_gone(tiers, r1):
    r1.uplink.mirror.set("state/a", ONLINE)
    assert tiers.heard.get(timeout=WAIT_S) == ("r1", "a", "state", ONLINE)
    r1.uplink.mirror.set("note/a/m", b"{}")
    assert tiers.heard.get(timeout=WAIT_S) == ("r1", "a", "rollout", b"{}")
    r1.uplink.mirror.set("region/r1", protocol.pack(STATE))
    assert tiers.told.get(timeout=WAIT_S) == ("region/r1", protocol.pack(STATE))
    assert tiers.children.regions() == {"r1": STATE}
    tiers.drop()
    gone = {tiers.heard.get(timeout=WAIT_S) for _ in range(2)}
    assert gone == {("r1", "a", "state", b""), ("r1", "a", "rollout", b"")}
    assert tiers.told.get(timeout=WAIT_S) == ("region/r1", None)
    assert tiers.children.regions() == {}


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("state/c", ONLINE, "may not connect below it"),
        ("state/nobody", ONLINE, "may not connect below it"),
        ("region/r2", protocol.pack(STATE), "may not connect below it"),
        ("region/r1", b"{}", "version is missing"),
        ("work/a/1", b"{}", "unknown kind"),
    ],
)
def test_a_region_is_not_heard_about_others(tiers, r1, caplog, key, value, reason):
    r1.uplink.mirror.set(key, value)
    r1.uplink.mirror.set("state/a", ONLINE)
    assert tiers.heard.get(timeout=WAIT_S) == ("r1", "a", "state", ONLINE)  # and goes on
    assert tiers.heard.empty()
    assert reason in caplog.text


def test_a_device_that_is_assigned_elsewhere_is_gone_from_here(tiers, r1):
    r1.uplink.mirror.set("state/a", ONLINE)
    assert tiers.heard.get(timeout=WAIT_S)[2:] == ("state", ONLINE)
    tiers.members.assign("a", ["r2"])
    assert not tiers.children.speaks_for("r1", "a")
    r1.uplink.mirror.delete("state/a")
    assert tiers.heard.get(timeout=WAIT_S) == ("r1", "a", "state", b"")


def test_a_command_is_told_until_its_answer_is_here(tiers, r1):
    command = LogWanted(request="r", lines=10)
    tiers.children.send_command("r1", "a", command)
    assert r1.until(lambda entries: "command/a" in entries)["command/a"] == encode(command)
    sent = LogSent(request="r", text="one\n  two", cut=True)
    r1.uplink.mirror.set("log/a", protocol.pack(sent))
    assert tiers.logs.get(timeout=WAIT_S) == ("a", sent)
    r1.until(lambda entries: "command/a" not in entries)
    r1.uplink.mirror.set("log/c", protocol.pack(sent))  # not its own
    r1.uplink.mirror.set("state/a", ONLINE)
    while tiers.heard.get(timeout=WAIT_S)[2] != "state":
        pass
    assert tiers.logs.empty()


class Relayed:
    """A message of a Flower app for device a, which is open at the cloud, and the answers that it has got."""

    def __init__(self, tiers, number=4, device="a"):
        self.tiers, self.answers = tiers, []
        self.content = tiers.folder / "content"
        self.content.write_bytes(bytes(3 << 20))
        self.sha256 = hashlib.sha256(self.content.read_bytes()).hexdigest()
        self.deliver = Deliver(
            job="relay-1", round=number, envelope="{}", content=BlobRef(sha256=self.sha256, size=3 << 20),
            content_blake3="00", bundle=Signed(text="", key_id="", signature=""), deadline_s=600.0,
            max_update_bytes=1 << 20,
        )  # fmt: skip
        around = Surroundings(act=lambda _instruction: None)
        self.opened = OpenRound(self.deliver, (device,), Terms(deadline_s=600.0, offline_grace_s=5.0), around)
        self.opened.record = self.answers.append
        self.opened.source = self.content
        tiers.rounds.add(self.opened)
        self.opened.begin(is_announced=True)
        self.key = f"deliver/relay-1/{number}"

    def reply(self, uplink, data=b"reply", device="a", reason=""):
        path = self.tiers.folder / "reply"
        path.write_bytes(data)
        one = SumFile(
            job="relay-1", round=self.deliver.round, number=0, path=None if reason else path,
            blake3="" if reason else blake3(data).hexdigest(), note=MessageReply(device=device, reason=reason),
        )  # fmt: skip
        return self.tiers.thread.run(uplink.send(one))


def test_a_message_goes_to_the_region_of_its_device_and_the_reply_is_the_devices(tiers, r1):
    relayed = Relayed(tiers)
    tiers.children.send_job("r1", "a", relayed.deliver)
    told = protocol.unpack(Message, r1.until(lambda entries: relayed.key in entries)[relayed.key])
    assert (told.device, told.deliver.round, told.deliver.content) == ("a", 4, relayed.deliver.content)
    assert 590 < told.deliver.deadline_s <= 600
    tiers.thread.run(r1.uplink.fetch(relayed.sha256))  # the content is no blob of the cloud
    tiers.thread.run(r1.uplink.fetch(relayed.sha256))
    assert r1.uplink.down_bytes < 1.1 * (3 << 20)
    assert relayed.reply(r1.uplink).status == 1  # STORED
    [answer] = relayed.answers
    assert (answer.device, answer.region) == ("a", "r1")
    assert tiers.spool.file("relay-1", 4, "a").read_bytes() == b"reply"
    r1.until(lambda entries: relayed.key not in entries)
    assert relayed.reply(r1.uplink).status == 2  # STALE: it is answered
    assert len(relayed.answers) == 1


def test_a_reply_without_content_has_its_reason(tiers, r1):
    relayed = Relayed(tiers)
    assert relayed.reply(r1.uplink, reason="no memory").status == 1
    assert [(one.reason, one.file) for one in relayed.answers] == [("no memory", None)]


@pytest.mark.parametrize(
    ("device", "data", "words"),
    [
        ("c", b"x", "replies for 'c', which is not asked, or may not connect below it"),
        ("b", b"x", "replies for 'b', which is not asked"),
        ("a", bytes((1 << 20) + 1), "at most 1048576 are allowed"),
    ],
)
def test_a_reply_that_cannot_be_is_refused(tiers, r1, device, data, words):
    relayed = Relayed(tiers)
    state = relayed.reply(r1.uplink, data, device=device)
    assert (state.status, words in state.reason) == (3, True)  # REFUSED
    assert relayed.answers == []
    assert relayed.reply(r1.uplink).status == 1


def test_a_message_that_nobody_waits_for_is_taken_back(tiers, r1):
    first, second = Relayed(tiers), Relayed(tiers, number=5)
    for one in (first, second):
        tiers.children.send_job("r1", "a", one.deliver)
    r1.until(lambda entries: {first.key, second.key} <= entries.keys())
    tiers.children.send_job("r1", "a", RoundClosed(job="relay-1", round=4, job_ended=False))
    r1.until(lambda entries: first.key not in entries)
    tiers.children.send_job("r1", "a", RoundClosed(job="relay-1", round=5, job_ended=True))
    r1.until(lambda entries: second.key not in entries)


def test_a_region_that_comes_back_is_told_the_messages_of_its_devices(tiers):
    relayed = Relayed(tiers)
    others = Heard()
    heard = Heard()
    tiers.uplink("r2", others)
    tiers.uplink("r1", heard)
    heard.until(lambda entries: relayed.key in entries)
    others.until(lambda entries: "running" in entries and "revoked" in entries)
    assert relayed.key not in others.entries
    tiers.children.moved("a", "r1")
    tiers.children.close_round("relay-1", 4)
    heard.until(lambda entries: relayed.key not in entries)


def test_releases_are_told_to_all_regions_of_a_device(tiers, r1):
    signed = Signed(text='{"release": {"model": "m"}}', key_id="k", signature="s")
    tiers.children.send_desired("a", signed)
    assert r1.until(lambda entries: "desired/a/m" in entries)["desired/a/m"] == encode(signed)
    tiers.desired = {"b": [signed]}
    tiers.drop()
    again = Heard()
    tiers.uplink("r1", again)
    again.until(lambda entries: "desired/b/m" in entries and "revoked" in entries)
    assert "desired/a/m" not in again.entries


def test_the_newer_of_two_streams_of_a_region_counts(tiers, r1):
    r1.uplink.mirror.set("state/a", ONLINE)
    tiers.heard.get(timeout=WAIT_S)
    second = Heard()
    newer = tiers.uplink("r1", second)
    second.until(lambda entries: "revoked" in entries)
    newer.mirror.set("state/b", ONLINE)
    while (said := tiers.heard.get(timeout=WAIT_S))[1] != "b":
        pass
    assert said == ("r1", "b", "state", ONLINE)
