"""What is learnt of devices in each job's rounds, in the database, for jobs whose cohorts depend on it.

Invariant: it is written in the commit that finishes the round, so that a job chooses the same after a restart.
"""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa

from cloud.state.store import jobs, participations
from edgefl.choosing.history import History, Participation, as_row, from_row


def load_history(engine: sa.Engine, job: str) -> History:
    """Return a job's history; devices that are new to it have what their last job of the same task says of them."""
    with engine.begin() as db:
        task, created_s = db.execute(sa.select(jobs.c.task, jobs.c.created_s).where(jobs.c.id == job)).one()
        earlier = (
            sa.select(participations.c.device, participations.c.facts)
            .join_from(participations, jobs, participations.c.job == jobs.c.id)
            .where((jobs.c.task == task) & (jobs.c.created_s < created_s))
            .order_by(jobs.c.created_s)
        )
        before = {row.device: from_row(row.facts) for row in db.execute(earlier)}
        known = {
            device: Participation(samples=one.samples, duration_s=one.duration_s) for device, one in before.items()
        }
        own = sa.select(participations.c.device, participations.c.facts).where(participations.c.job == job)
        known |= {row.device: from_row(row.facts) for row in db.execute(own)}
    return History(known)


def keep_history(db: sa.Connection, job: str, changed: Mapping[str, Participation]) -> None:
    """Store the participations that a round has changed."""
    if not changed:
        return
    old = (participations.c.job == job) & participations.c.device.in_(sa.bindparam("names", expanding=True))
    db.execute(participations.delete().where(old), {"names": list(changed)})
    db.execute(
        participations.insert(), [{"job": job, "device": name, "facts": as_row(one)} for name, one in changed.items()]
    )
