"""Which devices a job may use, and why not the others."""

from __future__ import annotations

from cloud.jobs.choice import ChoiceBoard, DeviceChoice, Reason
from cloud.jobs.device_shares import DeviceShares
from edgefl.config import RoundsConfig
from edgefl.protocols.messages import DeviceState, Telemetry


def telemetry(mem_mb):
    return Telemetry(
        cpu_count=4, cpu_percent=5.0, load_1m=0.1, ram_total_mb=8000.0, ram_available_mb=mem_mb, disk_free_mb=9e4
    )


class StillLink:
    """Presence that nothing changes while a choice waits."""

    def __init__(self, **devices):
        self.all, self.measured, self.waits_s = devices, {}, []

    def states(self):
        return self.all

    def telemetry(self, device):
        return self.measured.get(device)

    def wait_until(self, predicate, timeout_s):
        self.waits_s.append(timeout_s)
        return predicate()


def device(*, online=True, refuses=None, **tags):
    return DeviceState(session=1, online=online, agent_version="0", tags=tags, refuses=refuses or {})


def choice(link, board=None, shares=None, job="job", **rounds):
    return DeviceChoice(job, RoundsConfig(**rounds), link, shares or DeviceShares(), board or ChoiceBoard())


def test_each_device_that_is_not_chosen_has_its_reason():
    link = StillLink(
        a=device(site="x"), b=device(site="x"), c=device(site="y"), d=device(refuses={"not-idle": "80%"}, site="x"),
        e=device(online=False, site="x"), f=device(site="x"), g=device(site="x"),
    )  # fmt: skip
    link.measured = {name: telemetry(2000.0) for name in "abcdefg"} | {"f": telemetry(100.0)}
    shares, board = DeviceShares(), ChoiceBoard()
    shares.enter("other")
    shares.keep("other", ["g"])
    asked = choice(link, board, shares, clients=1, select="tag.site == 'x' and mem_mb > 500")
    assert asked.wait(lambda: False, is_first=True) == ["a", "b"]
    asked.chosen(["a"])
    assert board.reasons["job"] == {
        "b": Reason("utility", "others were drawn"),
        "c": Reason("select", "tag.site is 'y', mem_mb is 2000"),
        "d": Reason("policy", "its own policy: not-idle (80%)"),
        "f": Reason("select", "tag.site is 'x', mem_mb is 100"),
        "g": Reason("busy", "it works for other"),
    }
    assert asked.not_chosen()["b"] == ("utility", "others were drawn")
    assert shares.holder("b") is None
    asked.freed(["a"])
    assert shares.holder("a") is None


def test_a_device_that_the_job_cannot_use_where_it_is_says_so():
    board = ChoiceBoard()
    asked = choice(StillLink(a=device(), b=device()), board)
    asked.unreachable = lambda name: "below a region" if name == "b" else ""
    assert asked.wait(lambda: False, is_first=True) == ["a"]
    asked.chosen(["a"])
    assert board.reasons["job"] == {"b": Reason("tier", "below a region")}


def test_busy_devices_are_waited_for_as_long_as_it_takes():
    link, shares, board = StillLink(a=device(), b=device()), DeviceShares(), ChoiceBoard()
    shares.enter("other")
    shares.keep("other", ["a"])
    looks = iter(range(100))

    def is_stopped():
        if next(looks) == 20:
            assert board.waits["job"] == "waiting for 1 device that works for other; position 1 in the queue"
            shares.leave("other")
        return False

    assert choice(link, board, shares).wait(is_stopped, is_first=True) == ["a", "b"]


def test_a_job_that_shares_devices_waits_for_nobody_and_takes_none_away():
    link, shares = StillLink(a=device(), b=device()), DeviceShares()
    shares.enter("other")
    shares.keep("other", ["a"])
    sharing = choice(link, shares=shares, shared_devices=True)
    assert sharing.wait(lambda: False, is_first=True) == ["a", "b"]
    sharing.chosen(["a", "b"])
    assert (shares.holder("a"), shares.holder("b")) == ("other", None)


def test_too_few_are_returned_after_the_waits():
    link = StillLink(a=device())
    assert choice(link, clients=2, quorum=2, wait_s=30.0).wait(lambda: False, is_first=True) == ["a"]
    assert link.waits_s == [30.0, 0.0]


def test_telemetry_is_looked_at_again():
    link = StillLink(a=device())
    assert choice(link, select="mem_mb > 1", wait_s=12.0).wait(lambda: False, is_first=True) == []
    assert link.waits_s == [5.0, 5.0, 2.0, 0.0]
