"""Malformed messages of an enrolled device, on every topic and call: each costs itself, nothing else.

The device `evil` has a certificate of the fleet and no agent: this test speaks in its name.
"""

import json
import math
import queue

import grpc
import httpx
import pytest

from edgefl.operator.client import CloudClient, load_credentials
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols import fleet_pb2_grpc as rpc
from edgefl.protocols import tls, topics
from edgefl.protocols.messages import Fit, decode_job
from edgefl.protocols.mqtt import LinkConfig
from edgefl.protocols.tls import Identity
from edgefl.terminal.text import is_safe
from tests.threaded import Link

STATE = {"session": 1, "online": True, "agent_version": "1", "models": {"m": 1}, "tags": {"a": "b"}, "serving_url": ""}
NOTE = {"model": "m", "version": 1, "state": "active", "detail": "d"}
TELEMETRY = {
    "cpu_count": 1, "cpu_percent": 1.0, "load_1m": 1.0, "ram_total_mb": 1.0, "ram_available_mb": 1.0,
    "disk_free_mb": 1.0, "battery_percent": None, "on_mains": None,
}  # fmt: skip
GOOD = {"state": STATE, "rollout": NOTE, "telemetry": TELEMETRY}

VALUES = [
    10**22, -(10**22), 2**63, -1, 10**3999, True, 1.5, math.nan, math.inf, -math.inf, None, "", "x", "\ud800", "\0",
    "\x1b[2J\x1b]0;owned\x07", "a\n2026-11-25 00:00:00,000 INFO cloud forged", "\u202e", "[red]x", "x" * 30_000, [], {},
    [[[]]], {"\x1b[31m": "\x1b[2J"}, {"\ud800": 10**22}, {"k" * 30_000: 1}, {str(n): n for n in range(3000)},
    {"m": 10**22}, {"m": True}, {"a": {"b": {}}},
]  # fmt: skip
BYTES = [
    b"", b"\0", b"{", b"[]", b"3", b"null", b'"x"', b"\xff\xfe\x00", b"\xef\xbb\xbf{}", b"[" * 32_000, b'{"a":' * 6000,
    b"9" * 4000, b"9" * 32_000, b'{"session": 1e999}', b'{"kind":"plan"}', b"\x1b[2J" * 100,
]  # fmt: skip


def payloads(good):
    for name in good:
        for value in VALUES:
            yield json.dumps({**good, name: value}).encode()[: 32 << 10]
    yield from BYTES


@pytest.fixture
def evil(fleet):
    """What speaks in the device's name: an MQTT link, its inbox, and gRPC stubs."""
    home = fleet.enroll("evil", "--tag", "site=north")
    inbox = queue.Queue()
    config = LinkConfig(
        url=f"mqtts://127.0.0.1:{fleet.mqtt_port}", client_id="evil", identity=Identity.in_folder(home),
        subscriptions=[(topics.down("evil", "job"), 1)],
    )  # fmt: skip
    link = Link(config, on_failure=pytest.fail, on_message=lambda _topic, payload: inbox.put(payload))
    with link, grpc.secure_channel(
        f"127.0.0.1:{fleet.grpc_port}", tls.grpc_channel_credentials(Identity.in_folder(home))
    ) as channel:  # fmt: skip
        assert link.wait_connected(10)
        yield link, inbox, channel


def health(fleet):
    with CloudClient(None, load_credentials(fleet.credentials)) as client:
        return client.health()


def shown(fleet, *command):
    """Return what a command prints; nothing in it moves a cursor or starts a line of its own."""
    said = fleet.command(*command)
    assert all(is_safe(part) for line in said.split("\n") for part in line.split("\t")), said
    return said


def all_is_well(fleet):
    found = health(fleet)
    assert found["status"] == "ok", found
    assert all(part["ok"] for part in found["parts"].values())
    assert {"link", "broker", "database", "disk", "jobs", "grpc"} <= set(found["parts"])
    assert "online" in shown(fleet, "devices", "list")
    with httpx.Client(
        base_url=fleet.url, verify=tls.client_context(fleet.home / "tls" / "ca.pem"), trust_env=False,
        headers={"Authorization": f"Bearer {load_credentials(fleet.credentials).token}"},
    ) as http:  # fmt: skip
        answer = http.get("/v1/devices")
        assert answer.status_code == 200
        assert is_safe(answer.text)
    assert all(is_safe(line) for line in fleet.cloud.log.read_text().split("\n"))


def is_heard(fleet, link, session):
    """A right message that comes after all the others is still heard."""
    good = {**STATE, "session": session, "online": False, "tags": {"heard": str(session)}}
    link.publish(topics.up("evil", "state"), json.dumps(good).encode(), retain=True)
    fleet.cloud.wait_for("device.offline device=evil")


def test_no_message_over_mqtt_costs_more_than_itself(fleet, three, evil, round_is_right):
    three(fleet)
    link, _, _ = evil
    for kind, good in GOOD.items():
        for payload in payloads(good):
            link.publish(topics.up("evil", kind), payload)
    link.publish(topics.up("evil", "rollout"), json.dumps({**NOTE, "version": 10**22}).encode(), retain=True)
    link.publish(topics.up("evil", "state"), json.dumps({**STATE, "session": 2**62}).encode(), retain=True)
    fleet.cloud.wait_for("device.bad_message device=evil")
    is_heard(fleet, link, 2**62 + 1)
    all_is_well(fleet)
    round_is_right(fleet)
    fleet.cloud.stop()
    fleet.start_cloud()  # and hears again what the broker has kept
    for agent in fleet.agents.values():
        agent.wait_for("mqtt.up")
    round_is_right(fleet)
    all_is_well(fleet)


def test_no_message_over_grpc_costs_more_than_its_call(fleet, three, evil, round_is_right):
    three(fleet)
    _, _, channel = evil
    stub = rpc.FleetStub(channel)
    text, long = "\x1b[2J\nforged\0", "\x1b" * 100_000
    keys = [pb.UpdateKey(), pb.UpdateKey(job=text, round=2**32 - 1), pb.UpdateKey(job=long, round=1)]
    for key in keys:
        stub.Fail(pb.FailureReport(key=key, reason=long), timeout=10)
        assert is_safe(stub.Resume(key, timeout=10).reason)
        for facts in ({"weight": math.nan}, {"size": 2**64 - 1, "offset": 2**64 - 1}, {"metrics": {text: math.inf}}):
            header = pb.UploadHeader(key=key, blake3=long, **facts)
            chunks = [pb.UploadChunk(header=header), pb.UploadChunk(data=b"x"), pb.UploadChunk(header=header)]
            assert is_safe(stub.Upload(iter(chunks), timeout=10).reason)
    stub.Next(pb.NextRequest(agent_version=long, holding=[text] * 20_000), timeout=10)
    for sha256 in (text, long[:1000], "../../operator.json", "", "0" * 64):
        with pytest.raises(grpc.RpcError):
            list(stub.Download(pb.DownloadRequest(sha256=sha256, offset=2**64 - 1), timeout=10))
    for method in ("Next", "Fail", "Resume", "Renew"):
        for raw in (b"\xff" * 100, b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02\xc3\x28", b"\0"):
            with pytest.raises(grpc.RpcError):
                channel.unary_unary(f"/edgefl.v1.Fleet/{method}", lambda one: one, None)(raw, timeout=10)
    for raw in ([], [b""], [b"\xff" * 50], [pb.UploadChunk(data=b"x").SerializeToString()]):
        with pytest.raises(grpc.RpcError):
            channel.stream_unary("/edgefl.v1.Fleet/Upload", lambda one: one, None)(iter(raw), timeout=10)
    all_is_well(fleet)
    round_is_right(fleet)


def test_a_devices_reason_forges_nothing_on_the_operators_screen(fleet, three, evil, round_is_right):
    three(fleet)
    link, inbox, channel = evil
    state = {**STATE, "session": 2**61, "tags": {"site": "[red]north[/red]"}}
    link.publish(topics.up("evil", "state"), json.dumps(state).encode(), retain=True)
    fleet.cloud.wait_for("device.online device=evil")
    run = fleet.start_run("numbers", "rounds.clients=4", "rounds.quorum=3", "rounds.deadline_s=20")
    plan = decode_job(inbox.get(timeout=30))
    assert isinstance(plan, Fit)
    reason = "\x1b[2J\x1b]0;owned\x07[red]gone[/red]\nround 2/1: 99 admitted\r\u202e\x9b"
    report = pb.FailureReport(key=pb.UpdateKey(job=plan.job, round=plan.round), reason=reason)
    rpc.FleetStub(channel).Fail(report, timeout=10)
    result, _ = fleet.finish_run(run)
    [entry] = result["rounds"]
    assert (entry["admitted"], entry["failed"]) == (3, 1)
    assert entry["reasons"]["evil"].startswith("\\x1b[2J\\x1b]0;owned\\x07[red]gone[/red] round 2/1: 99 admitted")
    lines = fleet.runner.log.read_text().split("\n")
    assert all(is_safe(line) for line in lines)
    assert not [line for line in lines if line.startswith("round 2/1")]
    for command in (("jobs", "list"), ("jobs", "show", plan.job), ("devices", "list")):
        assert not [line for line in shown(fleet, *command).split("\n") if line.startswith("round 2/1")]
    assert "[red]north[/red]" in shown(fleet, "devices", "list")
    is_heard(fleet, link, 2**61 + 1)
    all_is_well(fleet)
    round_is_right(fleet)
