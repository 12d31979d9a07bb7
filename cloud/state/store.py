"""The cloud's database: SQLAlchemy Core over SQLite (WAL, synchronous FULL) under the home.

Commits survive kill -9 and power loss. The rows of jobs, rounds and updates are the complete state of all jobs;
`cloud/state/jobs.py`, `relay_rows.py`, `enrolment.py`, `enrolment_tokens.py`, `members.py`, `registry.py`,
`rollout.py`, `cloud/jobs/control.py`, `kept_models.py`, `participations.py`, `cloud/region/parents.py` and
`cloud/trust/renewal.py` are the only modules that query them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa

TABLES = sa.MetaData()

tokens = sa.Table(
    "tokens",
    TABLES,
    sa.Column("secret_sha256", sa.String, primary_key=True),  # the secret itself is never kept
    sa.Column("expires_s", sa.Float, nullable=False),  # seconds since 1970
    sa.Column("used_by", sa.String),  # device; NULL = not used yet
    sa.Column("label", sa.String),  # for people
    sa.Column("made_s", sa.Float),  # NULL = by an older cloud
    sa.Column("revoked_s", sa.Float),  # NULL = it is not revoked
    sa.Column("role", sa.String),  # what it enrols: NULL = a device, or `region`
)

devices = sa.Table(
    "devices",
    TABLES,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("serial", sa.String, nullable=False),  # of its current certificate
    sa.Column("tags", sa.JSON, nullable=False),
    sa.Column("enrolled_s", sa.Float, nullable=False),
    sa.Column("role", sa.String),  # NULL = a device, or `region`
    sa.Column("parents", sa.JSON(none_as_null=True)),  # where it connects, in this order; NULL = the cloud
    sa.Column("former_parents", sa.JSON(none_as_null=True)),  # where it may still try to connect; NULL = nowhere else
)

renewals = sa.Table(  # issued certificates that devices have not used yet
    "renewals",
    TABLES,
    sa.Column("device", sa.String, primary_key=True),
    sa.Column("serial", sa.String, nullable=False),
    sa.Column("certificate", sa.String, nullable=False),  # PEM
    sa.Column("issued_s", sa.Float, nullable=False),
)

revoked = sa.Table(  # revoked certificates
    "revoked",
    TABLES,
    sa.Column("number", sa.Integer, primary_key=True),  # increasing: the order in the CRL
    sa.Column("serial", sa.String, nullable=False),
    sa.Column("device", sa.String, nullable=False),
    sa.Column("revoked_s", sa.Float, nullable=False),
)

jobs = sa.Table(
    "jobs",
    TABLES,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("task", sa.String, nullable=False),
    sa.Column("bundle", sa.JSON, nullable=False),  # messages.Signed
    sa.Column("config", sa.JSON, nullable=False),  # config.JobConfig
    sa.Column("buffers", sa.JSON, nullable=False),  # names of tensors that change, but are not trained
    sa.Column("state", sa.String, nullable=False),  # running | paused | done | failed | cancelled
    sa.Column("rounds_done", sa.Integer, nullable=False),
    sa.Column("model_sha256", sa.String, nullable=False),  # parameters after `rounds_done`
    sa.Column("model_size", sa.Integer, nullable=False),
    sa.Column("optimizer_sha256", sa.String),  # server optimizer's state after `rounds_done`
    sa.Column("error", sa.String),
    sa.Column("created_s", sa.Float, nullable=False),
    sa.Column("ended_s", sa.Float),
    sa.Column("parted", sa.Boolean),  # whether parameters are only trained tensors and buffers; NULL = not known
    sa.Column("frozen_sha256", sa.String),  # all other tensors of the model, until the job is done
    sa.Column("frozen_size", sa.Integer),
    sa.Column(
        "division", sa.JSON(none_as_null=True)
    ),  # messages.Division of a job in parts; NULL = devices train it all
    sa.Column("evaluation", sa.JSON),  # records.EvaluationSpec; NULL = devices do not evaluate
    sa.Column("last_evaluation", sa.JSON),  # rounds.LastEvaluation.as_json(), once the job is done
    sa.Column("name", sa.String),  # display name of the task; NULL = `task`
    sa.Column("label", sa.String),  # the name that its operator gave it (--name), if any
    sa.Column("stopped", sa.String),  # why it ended before its last round (rounds.stop); NULL = it did not
    sa.Column("continues", sa.String),  # the job and round from which it started; NULL = from first parameters
    sa.Column("not_chosen", sa.JSON(none_as_null=True)),  # of its latest round: device -> (code, reason)
    sa.Column("owed", sa.JSON(none_as_null=True)),  # devices whose answer of round `rounds_done` counts in the next one
)

rounds = sa.Table(
    "rounds",
    TABLES,
    sa.Column("job", sa.String, primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("cohort", sa.JSON, nullable=False),
    sa.Column("outcome", sa.JSON),  # RoundOutcome.as_json() and the model after it; NULL = open
    sa.Column("evaluated", sa.JSON),  # metrics of the model after it, from operators; null = not a finite number
    sa.Column("optimizer_sha256", sa.String),  # the optimizer's state after it, as long as its model is kept
)

participations = sa.Table(  # of devices in jobs whose cohorts depend on them
    "participations",
    TABLES,
    sa.Column("job", sa.String, primary_key=True),
    sa.Column("device", sa.String, primary_key=True),
    sa.Column("facts", sa.JSON, nullable=False),  # edgefl.choosing.history.as_row
)

updates = sa.Table(
    "updates",
    TABLES,
    sa.Column("job", sa.String, primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("device", sa.String, primary_key=True),
    sa.Column("file", sa.String),  # under spool/; NULL if the device failed
    sa.Column("weight", sa.Float),
    sa.Column("metrics", sa.JSON, nullable=False),
    sa.Column("reason", sa.String),  # why there is no update
    sa.Column("evaluation", sa.JSON(none_as_null=True)),  # records.DeviceEvaluation; NULL = none
    sa.Column("region", sa.String),  # that sent it, within a sum; NULL = the device itself
    sa.Column("refused", sa.Boolean),  # by the guard of its region
)

# What runs for each device of each round: SQLAlchemy takes longer to make a statement than to run it.
NEW_UPDATE = updates.insert()
SERIAL_OF = sa.select(devices.c.serial).where(devices.c.name == sa.bindparam("name"))

sums = sa.Table(  # of regions, accepted
    "sums",
    TABLES,
    sa.Column("job", sa.String, primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("file", sa.String, primary_key=True),  # under spool/
    sa.Column("note", sa.String, nullable=False),  # tiers.SumNote
)

relays = sa.Table(
    "relays",
    TABLES,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("app", sa.String, nullable=False),
    sa.Column("bundle", sa.JSON, nullable=False),  # messages.Signed
    sa.Column("state", sa.String, nullable=False),  # running | done | failed | cancelled
    sa.Column("sent", sa.Integer, nullable=False),  # number of the last message
    sa.Column("answered", sa.Integer, nullable=False),
    sa.Column("error", sa.String),
    sa.Column("created_s", sa.Float, nullable=False),
    sa.Column("ended_s", sa.Float),
    sa.Column("name", sa.String),  # display name of the app; NULL = `app`
    sa.Column("label", sa.String),  # the name that its operator gave it (--name), if any
)

errands = sa.Table(  # messages of running relays that the operator has not confirmed
    "errands",
    TABLES,
    sa.Column("relay", sa.String, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("device", sa.String, nullable=False),
    sa.Column("envelope", sa.String, nullable=False),
    sa.Column("content_sha256", sa.String, nullable=False),
    sa.Column("expires_s", sa.Float, nullable=False),  # seconds since 1970
    sa.Column("answered", sa.Boolean, nullable=False),
    sa.Column("file", sa.String),  # of the reply, under spool/; NULL if there is none (yet)
    sa.Column("reason", sa.String),  # why there is no reply
    sa.Column("lost", sa.Boolean, nullable=False),  # the cloud gave the device up
)

releases = sa.Table(
    "releases",
    TABLES,
    sa.Column("model", sa.String, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("signed", sa.JSON, nullable=False),  # messages.Signed of a manifest.Release
    sa.Column("created_s", sa.Float, nullable=False),
)

rollouts = sa.Table(
    "rollouts",
    TABLES,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("model", sa.String, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("rollback", sa.Boolean, nullable=False),
    sa.Column("created_s", sa.Float, nullable=False),
)

desired = sa.Table(
    "desired",
    TABLES,
    sa.Column("device", sa.String, primary_key=True),
    sa.Column("model", sa.String, primary_key=True),
    sa.Column("rollout", sa.String, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("sequence", sa.Integer, nullable=False),
    sa.Column("signed", sa.JSON, nullable=False),  # messages.Signed of a manifest.Desired
    sa.Column("state", sa.String, nullable=False),  # pending | downloading | installed | active | failed
    sa.Column("detail", sa.String, nullable=False),
)

parent_lists = sa.Table(  # of devices that were assigned to parents, or enrolled through a region
    "parent_lists",
    TABLES,
    sa.Column("device", sa.String, primary_key=True),
    sa.Column("sequence", sa.Integer, nullable=False),
    sa.Column("signed", sa.JSON, nullable=False),  # messages.Signed of a manifest.Parents
)

region_addresses = sa.Table(  # as the regions said last
    "region_addresses",
    TABLES,
    sa.Column("region", sa.String, primary_key=True),
    sa.Column("address", sa.JSON, nullable=False),  # manifest.ParentAddress
)


def open_database(path: Path) -> sa.Engine:
    """Open the SQLite database at a path, or create it."""
    engine = sa.create_engine(f"sqlite:///{path}", connect_args={"check_same_thread": False, "timeout": 10})
    sa.event.listen(engine, "connect", _set_pragmas)
    TABLES.create_all(engine)
    _add_new_columns(engine)
    return engine


def _add_new_columns(engine: sa.Engine) -> None:
    """Add new columns to the tables of an older home; their values are NULL."""
    inspector = sa.inspect(engine)
    with engine.begin() as db:
        for table in TABLES.sorted_tables:
            known = {column["name"] for column in inspector.get_columns(table.name)}
            for column in table.columns:
                if column.name not in known:
                    kind = column.type.compile(engine.dialect)
                    db.execute(sa.text(f'ALTER TABLE "{table.name}" ADD COLUMN "{column.name}" {kind}'))


def _set_pragmas(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()
