"""A mosquitto learns who is revoked while it runs, shows a renewed certificate, and loses who was removed."""

import os
import signal
import socket
import threading

import pytest

from cloud.broker.mosquitto import Mosquitto, MosquittoSettings, catches_hangup
from edgefl.protocols import tls
from edgefl.protocols.mqtt import LinkConfig
from tests.threaded import Link


@pytest.fixture
def mosquitto(broker, fleet_ca):
    """The hold on a running broker, and the serial numbers that are to be revoked."""
    if not hasattr(broker, "lines"):
        pytest.skip("the built-in broker asks the registry")
    revoked = []

    def hold(**changes):
        facts = {
            "url": broker.url, "folder": fleet_ca.folder, "ca_folder": fleet_ca.folder, "certificate_days": 397.0,
            "revoked": lambda: list(revoked),
        }  # fmt: skip
        return Mosquitto(MosquittoSettings(**facts | changes))

    return hold, revoked


def link_of(broker, fleet_ca, name, on_disconnect=lambda: None):
    config = LinkConfig(url=broker.url, client_id=name, identity=fleet_ca.device(name))
    return Link(config, on_disconnect=on_disconnect, on_failure=pytest.fail)


def serial_of(identity):
    return tls.serial_number(identity.cert.read_bytes())


def shown(broker, fleet_ca):
    """The serial number of the certificate that the broker shows."""
    context = tls.client_context(fleet_ca.cloud.ca, fleet_ca.device("looker"))
    with (
        socket.create_connection(("127.0.0.1", broker.port), 5) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as secure,
    ):
        return tls.serial_number(secure.getpeercert(binary_form=True))


def test_a_removed_device_is_cut_and_stays_out_and_nobody_else_notices(broker, fleet_ca, mosquitto):
    hold, revoked = mosquitto
    cut = threading.Event()
    with link_of(broker, fleet_ca, "a", cut.set) as removed, link_of(broker, fleet_ca, "b") as other:
        assert removed.wait_connected(5)
        assert other.wait_connected(5)
        revoked.append(serial_of(fleet_ca.device("a")))
        hold().drop("a")
        assert cut.wait(10)
        assert not removed.wait_connected(1.5)
        assert other.wait_connected(0)
        assert sum("as b " in line for line in broker.lines) == 1


def test_a_list_that_grew_counts_and_one_that_is_as_it_was_is_not_read_again(broker, fleet_ca, mosquitto):
    hold, revoked = mosquitto
    one = hold()
    for name in ("a", "b"):
        revoked.append(serial_of(fleet_ca.device(name)))
        one.refresh()
    written = (fleet_ca.folder / "crl.pem").read_bytes()
    one.refresh()
    assert (fleet_ca.folder / "crl.pem").read_bytes() == written
    for name, is_in in (("c", True), ("a", False), ("b", False)):  # c's handshake begins before the signal is heard
        with link_of(broker, fleet_ca, name) as link:
            assert link.wait_connected(1.5) is is_in


def test_the_brokers_certificate_is_renewed_for_the_hosts_that_it_has(broker, fleet_ca, mosquitto):
    hold, _ = mosquitto
    before = shown(broker, fleet_ca)
    hold().refresh()
    assert shown(broker, fleet_ca) == before
    hold(certificate_days=3000).refresh()
    renewed = serial_of(fleet_ca.cloud)
    assert renewed != before
    assert renewed in (shown(broker, fleet_ca) for _ in range(100))  # it reads the signal between two handshakes


def test_a_mosquitto_that_is_not_here_is_told_about(fleet_ca, mosquitto, tmp_path, caplog, broker):
    hold, revoked = mosquitto
    revoked.append("ff")
    (tmp_path / "pid").write_text("1")  # of another program
    hold(pid_file=tmp_path / "pid").refresh()
    assert "process 1 is not mosquitto" in caplog.text
    revoked.append("fe")
    hold(pid_file=tmp_path / "none").refresh()
    assert "broker.not_reloaded" in caplog.text
    hold(folder=tmp_path / "elsewhere").refresh()  # configured by other means: nothing is written


def test_a_mosquitto_that_is_just_starting_is_told_later(fleet_ca, broker, mosquitto, tmp_path, monkeypatch, caplog):
    hold, revoked = mosquitto
    one = hold()
    caplog.set_level("INFO")
    with monkeypatch.context() as starting:
        starting.setattr("cloud.broker.mosquitto.catches_hangup", lambda _pid: False)  # SIGHUP would end it
        revoked.append("ff")
        one.refresh()
    assert "broker.reloaded" not in caplog.text
    one.refresh()
    assert caplog.text.count("broker.reloaded") == 1
    one.refresh()
    assert caplog.text.count("broker.reloaded") == 1


def test_whether_a_process_catches_the_signal_is_seen():
    before = signal.signal(signal.SIGHUP, lambda *_: None)
    try:
        assert catches_hangup(os.getpid())
    finally:
        signal.signal(signal.SIGHUP, before)
    assert not catches_hangup(os.getpid())
    with pytest.raises(FileNotFoundError):
        catches_hangup(1 << 30)


def test_a_broker_that_is_away_is_tried_again(fleet_ca, broker, mosquitto, caplog):
    hold, revoked = mosquitto
    one = hold()
    with link_of(broker, fleet_ca, "b") as link:  # it serves: right after its start it forgets that it is to stop
        assert link.wait_connected(5)
    broker.stop()
    revoked.append(serial_of(fleet_ca.device("a")))
    one.drop("a")
    assert "broker.not_dropped device=a" in caplog.text
    broker.start()
    caplog.set_level("INFO")
    one.refresh()
    assert "broker.dropped device=a" in caplog.text


def test_a_configuration_of_an_earlier_version_is_told(fleet_ca, broker, mosquitto, caplog):
    hold, _ = mosquitto
    hold().begin()
    assert "broker.config_old" not in caplog.text
    path = fleet_ca.folder / "mosquitto.conf"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if "crlfile" not in line))
    hold().begin()
    assert "broker.config_old" in caplog.text


def test_a_device_that_came_back_before_the_list_was_read_is_ended_once_more(
    broker, fleet_ca, mosquitto, tmp_path, caplog
):
    hold, revoked = mosquitto
    one = hold(pid_file=tmp_path / "none")  # the operator's own unit sends the signal
    revoked.append(serial_of(fleet_ca.device("a")))
    one.drop("a")
    caplog.set_level("INFO")
    caplog.clear()
    one.refresh()
    one.refresh()
    assert caplog.text.count("broker.dropped device=a") == 1


def test_a_device_that_was_removed_as_the_cloud_ended_is_cut_by_the_next_one(broker, fleet_ca, mosquitto):
    hold, revoked = mosquitto
    revoked.append(serial_of(fleet_ca.device("a")))
    cut = threading.Event()
    with link_of(broker, fleet_ca, "a", cut.set) as removed:
        assert removed.wait_connected(5)
        one = hold(removed=["a"])
        one.begin()
        assert removed.wait_connected(0)
        one.refresh()
        assert cut.wait(10)
        assert not removed.wait_connected(1.5)
