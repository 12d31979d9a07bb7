"""What regions report to the cloud about themselves and about certificates, taken in a thread of its own.

It is written to the database, which may be locked for long, so the event loop only queues it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from cloud.broker.inbox import Inbox
from cloud.region.parents import ParentLists
from cloud.state.enrolment import Enrolment
from cloud.state.members import Members
from edgefl.protocols import tiers
from edgefl.protocols.tiers import RegionState


class RegionReports:
    """Reports of all regions. Methods may be called from any thread."""

    def __init__(self, parents: ParentLists, enrolment: Enrolment, members: Members) -> None:
        self._parents, self._enrolment, self._members = parents, enrolment, members
        self._inbox: Inbox[Callable[[], None]] = Inbox("region-reports", lambda report: report())
        self.start, self.close = self._inbox.start, self._inbox.close

    def told(self, key: str, value: bytes | None) -> None:
        """Take what a region is (`region/<name>`); None = it is not connected any more."""
        if value is not None:
            state = tiers.unpack(RegionState, value)
            self._inbox.put(key, functools.partial(self._parents.note_region, key.removeprefix("region/"), state))

    def used(self, device: str, serial: str) -> None:
        """Take that a device uses its renewed certificate, as if it had connected to the cloud."""
        self._inbox.put(device, functools.partial(self._note_serial, device, serial))

    def _note_serial(self, device: str, serial: str) -> None:
        if self._enrolment.renewals.has_next(device) and self._enrolment.is_known(device, serial):
            self._members.note_change()
