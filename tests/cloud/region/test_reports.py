"""What regions report: their addresses, and which certificates are in use."""

from __future__ import annotations

import threading

from cloud.region.parents import ParentLists
from cloud.region.reports import RegionReports
from edgefl.protocols import tiers
from edgefl.protocols.tls import Identity, new_request, serial_number
from tests.cloud.region.test_parents import CLOUD, OSLO, Fleet


def test_reports_are_taken_in_order_and_a_used_certificate_replaces_the_former(tmp_path):
    fleet = Fleet(tmp_path)
    lists = ParentLists(fleet.engine, fleet.key, CLOUD, lambda *_sent: None)
    reports = RegionReports(lists, fleet.enrolment, fleet.members)
    (tmp_path / "next").mkdir()
    renewed = fleet.enrolment.renewals.renew("cam-1", new_request(Identity.in_folder(tmp_path / "next"), "cam-1"))
    fleet.members.assign("cam-1", ["oslo"])
    reports.start()
    reports.told("region/oslo", tiers.pack(OSLO))
    reports.told("region/oslo", None)
    reports.used("cam-1", "ab")  # of no certificate
    reports.used("cam-1", serial_number(renewed))
    done = threading.Event()
    reports._inbox.put("", done.set)
    assert done.wait(30)
    reports.close()
    assert lists.of("cam-1") is not None  # its parent's address is known
    assert fleet.members.members()["cam-1"].serials == [serial_number(renewed)]
    assert len(fleet.enrolment.revoked()) == 1
