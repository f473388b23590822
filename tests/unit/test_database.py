"""A query gives rows as a file does, cannot change the database, and no error shows a password."""

from __future__ import annotations

import hashlib
import os
import pwd
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedllm.core.errors import FedllmError
from fedllm.silo.database import read_query, stream_query
from fedllm.silo.sources import read_rows

pytest.importorskip("sqlalchemy", reason="SQLAlchemy is not installed (the extra 'federation')")

ROWS = [{"id": 1, "prompt": "Où?", "response": "Là."}, {"id": 2, "prompt": 'say "hi"; 100 %s :x', "response": None}]
SELECT = "SELECT id, prompt, response FROM cases ORDER BY id"
SECRET = "p@ss/w:rd%41 #?"

WRITES = [
    "INSERT INTO cases VALUES (3, 'a', 'b')",
    "INSERT INTO cases VALUES (3, 'a', 'b') RETURNING id",
    "UPDATE cases SET response = 'x'",
    "DELETE FROM cases",
    "DROP TABLE cases",
    "CREATE TABLE other (a int)",
    "SELECT 1; DELETE FROM cases",
    "SELECT 1; COMMIT; DELETE FROM cases",
    "COMMIT",
    "",
    "SELEC 1",
]
ONLY_SQLITE = [
    "WITH x AS (SELECT 1) DELETE FROM cases",
    "PRAGMA user_version = 7",
    "PRAGMA journal_mode = WAL",
    "PRAGMA query_only = OFF",
    "PRAGMA writable_schema = ON",
    "ATTACH DATABASE 'other.db' AS other",
    "VACUUM",
    "VACUUM INTO 'copy.db'",
    "CREATE TEMP TABLE t (a)",
    "BEGIN IMMEDIATE",
    "REINDEX",
    "SELECT load_extension('x')",
]
ONLY_POSTGRES = [
    "WITH x AS (DELETE FROM cases RETURNING id) SELECT * FROM x",
    "SELECT nextval('numbers')",
    "SELECT set_config('transaction_read_only', 'off', false)",
    "SET TRANSACTION READ WRITE",
    "SELECT wipe()",
    "SELECT 1; ROLLBACK; BEGIN READ WRITE; DELETE FROM cases; COMMIT",
    "TRUNCATE cases",
    "SELECT * INTO other FROM cases",
    "COPY cases TO '/tmp/never-written'",
    "DO 'BEGIN DELETE FROM cases; END'",
    "LOCK TABLE cases IN EXCLUSIVE MODE",
]


def refusal(url: str, query: str, folder: Path | None = None) -> str:
    with pytest.raises(FedllmError) as caught:
        read_query(url, query, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def sqlite(tmp_path: Path) -> str:
    with sqlite3.connect(tmp_path / "cases.db") as connection:
        connection.execute("CREATE TABLE cases (id INTEGER PRIMARY KEY, prompt TEXT, response TEXT)")
        connection.executemany("INSERT INTO cases VALUES (:id, :prompt, :response)", ROWS)
    connection.close()
    return f"sqlite:///{tmp_path / 'cases.db'}"


def test_sqlite_gives_the_rows_of_the_table(sqlite, tmp_path):
    assert read_query(sqlite, SELECT) == ROWS
    assert read_query("sqlite:///cases.db", SELECT, tmp_path) == ROWS
    assert read_query(sqlite, "WITH x AS (SELECT prompt FROM cases) SELECT count(*) AS n FROM x") == [{"n": 2}]
    assert read_query(sqlite, "SELECT ':a %s %(b)s' AS text") == [{"text": ":a %s %(b)s"}]


@pytest.mark.parametrize("query", [*WRITES, *ONLY_SQLITE])
def test_sqlite_cannot_be_changed(sqlite, tmp_path, monkeypatch, query):
    monkeypatch.chdir(tmp_path)
    before = hashlib.sha256((tmp_path / "cases.db").read_bytes()).digest()
    assert "give one statement that only reads" in refusal(sqlite, query)
    assert hashlib.sha256((tmp_path / "cases.db").read_bytes()).digest() == before
    assert [file.name for file in tmp_path.iterdir()] == ["cases.db"]


def test_a_file_with_odd_characters_in_its_name_is_the_file_that_is_read(sqlite, tmp_path, monkeypatch):
    name = "a #1?mode=rwc&x=%41.db"
    (tmp_path / "cases.db").rename(tmp_path / name)
    monkeypatch.setenv("CASES", name)
    assert read_query("sqlite:///${CASES}", SELECT, tmp_path) == ROWS
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_rows_are_streamed(sqlite):
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"
    rows = stream_query(sqlite, endless)
    assert [next(rows)["i"] for _ in range(3000)] == list(range(1, 3001))
    rows.close()


def test_what_can_be_mended_is_named(sqlite, tmp_path, monkeypatch):
    assert "gave no rows" in refusal(sqlite, SELECT.replace("ORDER", "WHERE id > 9 ORDER"))
    assert "'id' is there twice" in refusal(sqlite, "SELECT id, id FROM cases")
    assert "no such table: casses" in refusal(sqlite, "SELECT * FROM casses")
    assert "none.db is not a file" in refusal("sqlite:///none.db", SELECT, tmp_path)
    assert "is not a file" in refusal("sqlite://", SELECT)
    assert not (tmp_path / "none.db").exists()
    (tmp_path / "text.db").write_text("no database, only text " * 100)
    assert "file is not a database" in refusal("sqlite:///text.db", SELECT, tmp_path)
    monkeypatch.delenv("FEDLLM_NONE", raising=False)
    assert "environment variable FEDLLM_NONE" in refusal("sqlite:///${FEDLLM_NONE}", SELECT)


def test_no_error_shows_a_password(monkeypatch):
    monkeypatch.setenv("PASSWORD", SECRET)
    monkeypatch.setenv("ADDRESS", f"nonsense {SECRET}")
    for url in (f"mysql://me:{SECRET}@host/x", "oracle://me:${PASSWORD}@host/x", "${ADDRESS}", f"nonsense {SECRET}"):
        assert SECRET not in refusal(url, SELECT)
    for url in (f"postgresql://me:{SECRET}@host/x", f"postgresql+psycopg://me:{SECRET}@host/x"):
        with pytest.raises(FedllmError, match="give a query beside its address") as caught:
            read_rows(url)
        assert SECRET not in str(caught.value)


def test_without_sqlalchemy_the_extra_is_named(sqlite, monkeypatch):
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    assert "pip install 'fedllm[federation]'" in refusal(sqlite, SELECT)


def test_without_psycopg_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    assert "pip install 'fedllm[postgres]'" in refusal("postgresql://me@127.0.0.1:1/x", SELECT)


@pytest.fixture(scope="module")
def server() -> Iterator[Path]:
    """The folder of the socket of a PostgreSQL server that listens nowhere else."""
    pytest.importorskip("psycopg", reason="psycopg is not installed (the extra 'federation')")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = str(found[-1]) if found else shutil.which("initdb")
    if initdb is None:
        pytest.skip("no PostgreSQL server is installed on this machine")
    nobody = pwd.getpwnam("nobody")  # a PostgreSQL server does not run as root
    ordinary = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="fedllm-pg-", dir="/tmp") as name:
        folder = Path(name)
        (folder / "password").write_text(SECRET)
        if ordinary:
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            os.chown(folder / "password", nobody.pw_uid, nobody.pw_gid)
        make = [initdb, "-D", f"{name}/data", "-U", "fedllm", "-A", "scram-sha-256", f"--pwfile={name}/password", "-N"]
        subprocess.run(make, check=True, capture_output=True, cwd=name, **ordinary)
        control = [str(Path(initdb).with_name("pg_ctl")), "-D", f"{name}/data", "-w", "-s"]
        options = f"-F -c listen_addresses='' -k {name} -c max_connections=5"
        log = ["-l", f"{name}/log", "-o", options, "start"]
        subprocess.run([*control, *log], check=True, cwd=name, stdout=subprocess.DEVNULL, **ordinary)
        try:
            yield folder
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], check=True, cwd=name, **ordinary)


@pytest.fixture
def postgres(server: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    import psycopg

    monkeypatch.setenv("PASSWORD", SECRET)
    with psycopg.connect(host=str(server), user="fedllm", password=SECRET, dbname="postgres") as connection:
        connection.execute("DROP TABLE IF EXISTS cases")
        connection.execute("CREATE TABLE cases (id int PRIMARY KEY, prompt text, response text)")
        connection.execute("CREATE SEQUENCE IF NOT EXISTS numbers")
        connection.execute(
            "CREATE OR REPLACE FUNCTION wipe() RETURNS int AS 'DELETE FROM cases; SELECT 1' LANGUAGE sql"
        )
        for row in ROWS:
            connection.execute("INSERT INTO cases VALUES (%(id)s, %(prompt)s, %(response)s)", row)
    return f"postgresql://fedllm:${{PASSWORD}}@/postgres?host={server}"


def test_postgresql_gives_the_rows_of_the_table(postgres):
    assert read_query(postgres, SELECT) == ROWS
    assert read_query(postgres.replace("postgresql:", "postgresql+psycopg2:"), SELECT) == ROWS
    assert read_query(postgres, "SELECT ':a %s %(b)s' AS text") == [{"text": ":a %s %(b)s"}]


@pytest.mark.parametrize("query", [*WRITES, *ONLY_POSTGRES])
def test_postgresql_cannot_be_changed(postgres, query):
    said = refusal(postgres, query)
    assert "give one statement that only reads" in said and SECRET not in said
    assert read_query(postgres, SELECT) == ROWS


def test_postgresql_streams(postgres):
    rows = stream_query(postgres, "SELECT generate_series(1, 2000000000) AS i, repeat('x', 1000) AS long")
    assert [next(rows)["i"] for _ in range(3000)] == list(range(1, 3001))
    rows.close()


def test_postgresql_does_not_show_the_password(postgres, server, monkeypatch):
    monkeypatch.setenv("PASSWORD", "wrong-one")
    assert "check its address, user and password" in refusal(postgres, SELECT)
    assert "wrong-one" not in refusal(postgres, SELECT)
    assert "wrong-one" not in refusal(f"postgresql:///postgres?host={server}&user=fedllm&password=wrong-one", SELECT)
    assert "wrong-one" not in refusal("postgresql://fedllm:wrong-one@127.0.0.1:1/postgres", SELECT)
