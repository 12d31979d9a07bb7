import sqlite3

import sqlalchemy as sa

from cloud.state.store import TABLES, open_database


def test_the_database_is_durable_and_read_while_written(tmp_path):
    engine = open_database(tmp_path / "cloud.db")
    with engine.begin() as db:
        assert db.execute(sa.text("PRAGMA journal_mode")).scalar() == "wal"
        assert db.execute(sa.text("PRAGMA synchronous")).scalar() == 2  # FULL
    engine.dispose()


def test_opening_again_keeps_what_is_there(tmp_path):
    engine = open_database(tmp_path / "cloud.db")
    row = {
        "name": "cam",
        "serial": "1f",
        "tags": {"site": "a"},
        "enrolled_s": 1.0,
        "role": None,
        "parents": ["r-1"],
        "former_parents": ["r-2"],
    }
    with engine.begin() as db:
        db.execute(TABLES.tables["devices"].insert().values(row))
    engine.dispose()
    again = open_database(tmp_path / "cloud.db")
    with again.begin() as db:
        assert dict(db.execute(TABLES.tables["devices"].select()).mappings().one()) == row
    again.dispose()


def test_an_older_home_gets_the_columns_that_came_since(tmp_path):
    with sqlite3.connect(tmp_path / "cloud.db") as db:
        db.execute("CREATE TABLE jobs (id VARCHAR PRIMARY KEY, task VARCHAR NOT NULL)")
        db.execute("INSERT INTO jobs VALUES ('job-1', 't:t')")
    db.close()
    engine = open_database(tmp_path / "cloud.db")
    jobs = TABLES.tables["jobs"]
    with engine.begin() as db:
        row = db.execute(sa.select(jobs.c.id, jobs.c.parted, jobs.c.frozen_sha256)).one()
    engine.dispose()
    assert row == ("job-1", None, None)


def test_every_table_is_there(tmp_path):
    open_database(tmp_path / "cloud.db").dispose()
    with sqlite3.connect(tmp_path / "cloud.db") as db:
        names = {row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    db.close()
    assert names == set(TABLES.tables)
