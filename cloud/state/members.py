"""Who belongs to the fleet and where: its devices, its regions, and the parents of each.

A region is below one parent, which it named when it enrolled. A device has an ordered list of parents: it connects to
the first that it reaches. A device may connect, and be spoken for, only where this list says so: at a parent in the
list, and through the regions above that parent.
Invariant: following the parents of a region leads to the cloud.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import sqlalchemy as sa

from cloud.state.enrolment import REGION
from cloud.state.store import devices, renewals
from edgefl.errors import ConfigError, EnrolmentRefused, NotFound
from edgefl.protocols.manifest import MAX_FORMER
from edgefl.protocols.tiers import MAX_PARENTS, Member
from edgefl.protocols.tls import CLOUD_NAME


def _move(db: sa.Connection, device: str, parents: Sequence[str]) -> None:
    """Set a device's parents, and note those that it leaves: it may try to connect there until it has learned it."""
    row = db.execute(sa.select(devices.c.parents, devices.c.former_parents).where(devices.c.name == device)).one()
    left = dict.fromkeys([*(row.former_parents or ()), *(row.parents or (CLOUD_NAME,))])
    former = [one for one in left if one not in parents][-MAX_FORMER:]
    db.execute(devices.update().where(devices.c.name == device).values(parents=list(parents), former_parents=former))


class Membership(Protocol):
    """The members that a cloud or a region knows."""

    def members(self) -> Mapping[str, Member]:
        """Return every member by its name."""


class Members:
    """All members of a fleet, in its cloud's database. Methods may be called from any thread."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self.changed: list[Callable[[], object]] = []  # called after each change

    def members(self) -> dict[str, Member]:
        """Return every device and every region by its name."""
        with self._engine.connect() as db:
            found = db.execute(sa.select(renewals.c.device, renewals.c.serial)).mappings()
            following = {row["device"]: row["serial"] for row in found}
            rows = db.execute(devices.select()).mappings().all()
        return {
            row["name"]: Member(
                serials=[row["serial"], *([following[row["name"]]] if row["name"] in following else [])],
                is_region=row["role"] == REGION,
                parents=row["parents"] or [CLOUD_NAME],
                tags=row["tags"],
            )
            for row in rows
        }

    def assign(self, pattern: str, parents: Sequence[str]) -> list[str]:
        """Set the parents of the devices whose names match a pattern (as in a shell), and return their names.

        Raises NotFound if no device matches, ConfigError for a parent that is no region, or named twice.
        """
        known = self.members()
        regions = sorted(name for name, one in known.items() if one.is_region)
        if unknown := [one for one in parents if one != CLOUD_NAME and one not in regions]:
            raise ConfigError(
                f"{', '.join(unknown)}: no region of this fleet. Its regions: {_names_of_regions(known)}. "
                f"{CLOUD_NAME} is the cloud itself"
            )
        if not parents or len(set(parents)) < len(parents) or len(parents) > MAX_PARENTS:
            raise ConfigError(f"--parents {','.join(parents)}: expected 1 to {MAX_PARENTS} names, each once")
        chosen = sorted(name for name, one in known.items() if not one.is_region and fnmatch.fnmatchcase(name, pattern))
        if not chosen:
            raise NotFound(f"no device matches {pattern!r}; list them with `edgefl devices list`")
        with self._engine.begin() as db:
            for name in chosen:
                _move(db, name, parents)
        self.note_change()
        return chosen

    def check_parent(self, name: str, parent: str) -> None:
        """Raise EnrolmentRefused unless a new member may be enrolled below this parent.

        Its way must lead to the cloud, and not through a region of the new member's name, which would close a circle.
        """
        known, at = self.members(), parent
        way: list[str] = []
        while at != CLOUD_NAME:
            if at == name or at in way:
                raise EnrolmentRefused(
                    f"{name!r} cannot be below {parent!r}: the way from there to the cloud would be a circle "
                    f"({' -> '.join([*way, at])}). Enrol it below another parent, or under another name. The token is "
                    "still good."
                )
            if at not in known or not known[at].is_region:
                below_it = f", the parent of {way[-1]!r}," if way else ""
                raise EnrolmentRefused(
                    f"{at!r}{below_it} is not a region of this fleet. Its regions: {_names_of_regions(known)}. "
                    f"{CLOUD_NAME} is the cloud itself. The token is still good."
                )
            way.append(at)
            at = known[at].parents[0]

    def let_go(self, name: str) -> list[str]:
        """Take a region that will be removed out of the parents of devices; return those devices.

        Raises ConfigError while a device has no other parent, or a region is below it. Does nothing for a device.
        """
        known = self.members()
        if name not in known or not known[name].is_region:
            return []
        if inside := children(name, known):
            raise ConfigError(
                f"region {name!r} cannot be removed: the regions {', '.join(inside)} are below it. Remove them first, "
                "or enrol them below another parent"
            )
        assigned = {one: list(member.parents) for one, member in known.items() if name in member.parents}
        if only := sorted(one for one, parents in assigned.items() if parents == [name]):
            shown = ", ".join(only[:5]) + (f" and {len(only) - 5} more" if len(only) > 5 else "")
            raise ConfigError(
                f"region {name!r} cannot be removed: it is the only parent of {shown}. Assign them elsewhere first: "
                f"`edgefl devices assign {only[0]} --parents {CLOUD_NAME}`, and let each connect once to learn of it"
            )
        with self._engine.begin() as db:
            for one, parents in assigned.items():
                _move(db, one, [parent for parent in parents if parent != name])
        return sorted(assigned)

    def note_change(self) -> None:
        """Tell the regions: a device was enrolled or removed."""
        for call in self.changed:
            call()


def below(region: str, members: Mapping[str, Member]) -> dict[str, Member]:
    """Return the members below a region: regions whose way to the cloud leads through it, and their devices."""
    inside = {region}
    while more := {
        name for name, one in members.items() if one.is_region and name not in inside and inside & {*one.parents}
    }:
        inside |= more
    return {
        name: one
        for name, one in members.items()
        if (name in inside if one.is_region else bool(inside & {*one.parents})) and name != region
    }


def children(parent: str, members: Mapping[str, Member]) -> list[str]:
    """Return the regions directly below a parent, by name."""
    return sorted(name for name, one in members.items() if one.is_region and list(one.parents[:1]) == [parent])


def _names_of_regions(members: Mapping[str, Member]) -> str:
    return ", ".join(sorted(name for name, one in members.items() if one.is_region)) or "none yet"
