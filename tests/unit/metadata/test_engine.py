"""The engine: group commit, isolation of failures, durability, events, migrations, damage."""

from __future__ import annotations

import asyncio
import errno
import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from supervisord_ctr import faults
from supervisord_ctr.api.events import events_pb2
from supervisord_ctr.errors import Error, FailedPrecondition, Internal, NotFound, Unavailable
from supervisord_ctr.metadata import recovery, schema
from supervisord_ctr.metadata.engine import Engine, PendingEvent, Transaction


def put(key: str, value: str = "x") -> object:
    def work(tx: Transaction) -> str:
        tx.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, value))
        return key

    return work


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metadata.db"


async def test_a_mutation_is_seen_by_readers_when_it_returns(path: Path) -> None:
    engine = Engine(path)
    engine.open()
    assert await engine.write(put("a")) == "a"
    assert engine.row("SELECT value FROM facts WHERE key = 'a'") == ("x",)
    engine.close()
    engine.close()
    again = Engine(path)
    again.open()
    assert again.rows("SELECT key FROM facts") == [("a",)]
    again.close()
    assert path.stat().st_mode & 0o777 == 0o600


async def test_mutations_that_wait_are_committed_together(path: Path) -> None:
    engine = Engine(path)
    engine.open()
    gate, entered = threading.Event(), threading.Event()

    def slow(tx: Transaction) -> None:
        entered.set()
        assert gate.wait(30)

    first = asyncio.get_running_loop().create_task(engine.write(slow))
    await asyncio.to_thread(entered.wait, 30)
    commits = []
    original = engine._transact
    engine._transact = lambda connection, batch: (commits.append(len(batch)), original(connection, batch))[1]
    others = [asyncio.get_running_loop().create_task(engine.write(put(str(number)))) for number in range(50)]
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(first, *others)
    assert sum(commits) == 50
    assert len(commits) == 1
    engine.close()


async def test_what_mutations_speak_of_is_on_disk_before_they_are(path: Path) -> None:
    engine = Engine(path)
    engine.open()
    seen: list[object] = []
    engine.before_sync = lambda: seen.append(keys_of(path))
    await engine.write(put("a"), durable=False)
    assert seen == []
    await engine.write(put("b"))
    assert seen == [["a"]]

    def fail() -> None:
        raise OSError(errno.EIO, "the disk said no")

    engine.before_sync = fail
    with pytest.raises(Error, match="the disk said no|Input/output"):
        await engine.write(put("c"))
    engine.before_sync = lambda: None
    await engine.write(put("d"))
    assert keys_of(path) == ["a", "b", "d"]
    engine.close()


def keys_of(path: Path) -> list[str]:
    connection = sqlite3.connect(path)
    try:
        return [row[0] for row in connection.execute("SELECT key FROM facts ORDER BY key")]
    finally:
        connection.close()


async def test_what_is_asked_for_in_one_turn_goes_to_disk_at_once(path: Path) -> None:
    engine = Engine(path)
    engine.open()
    syncs = []
    engine.before_sync = lambda: syncs.append(1)

    async def late(key: str) -> None:
        time.sleep(0.05)  # in the same turn, and long enough for a writer that was handed the first one already
        await engine.write(put(key))

    await asyncio.gather(engine.write(put("a")), late("b"), late("c"))
    assert len(syncs) == 1
    await engine.write(put("d"))
    assert len(syncs) == 2
    assert keys_of(path) == ["a", "b", "c", "d"]
    engine.close()


async def test_what_is_asked_for_right_before_the_end_is_done(path: Path) -> None:
    engine = Engine(path)
    engine.open()
    asked = asyncio.ensure_future(engine.write(put("a")))
    await asyncio.sleep(0)
    engine.close()
    await asked
    assert keys_of(path) == ["a"]


async def test_a_mutation_that_fails_undoes_only_itself(path: Path) -> None:
    engine = Engine(path)
    engine.open()

    def bad(tx: Transaction) -> None:
        tx.execute("INSERT INTO facts VALUES ('half', '1')")
        raise NotFound("no")

    def clash(tx: Transaction) -> None:
        tx.execute("INSERT INTO facts VALUES ('good', '2')")

    results = await asyncio.gather(
        engine.write(put("good")), engine.write(bad), engine.write(clash), engine.write(put("also")),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [str, NotFound, Internal, str]
    assert engine.rows("SELECT key FROM facts ORDER BY key") == [("also",), ("good",)]
    engine.close()


async def test_a_failing_disk_fails_the_batch_and_not_the_engine(path: Path) -> None:
    engine = Engine(path)
    engine.open()
    told = []
    engine.on_commit = lambda events, dirty: told.append(dirty)
    faults.arm("metadata.commit.before=error:EIO")
    try:
        with pytest.raises(Error, match="EIO"):
            await engine.write(put("lost"))
    finally:
        faults.arm("")
    await engine.write(put("kept"))
    assert engine.rows("SELECT key FROM facts") == [("kept",)]
    assert len(told) == 1
    engine.close()


async def test_the_log_is_moved_into_the_file(path: Path) -> None:
    engine = Engine(path)
    engine.open()
    await engine.write(lambda tx: [
        tx.execute("INSERT INTO cri_records VALUES ('k', ?, ?)", (str(number), b"v" * 500)) for number in range(3000)
    ])
    for _ in range(500):
        if path.stat().st_size > 1 << 20:
            break
        await asyncio.sleep(0.01)
    assert path.stat().st_size > 1 << 20
    engine.close()


async def test_p14_events_are_told_after_the_state_is_durable_and_before_the_caller_goes_on(path: Path) -> None:
    engine = Engine(path)
    engine.open()
    told: list[tuple[str, bool, object]] = []

    def listen(events: Sequence[PendingEvent], dirty: bool) -> None:
        for _, topic, _ in events:
            told.append((topic, dirty, engine.row("SELECT value FROM facts WHERE key = 'a'")))

    engine.on_commit = listen

    def work(tx: Transaction) -> None:
        tx.execute("INSERT INTO facts VALUES ('a', '1')")
        tx.dirty = True
        tx.event("ns", "/namespaces/create", events_pb2.NamespaceCreate(name="ns"))

    def fails(tx: Transaction) -> None:
        tx.event("ns", "/never", events_pb2.NamespaceCreate(name="ns"))
        raise NotFound("no")

    await engine.write(work)
    assert told == [("/namespaces/create", True, ("1",))]
    with pytest.raises(NotFound):
        await engine.write(fails)
    assert len(told) == 1
    engine.close()


async def test_a_cancelled_caller_does_not_cancel_the_mutation(path: Path) -> None:
    engine = Engine(path)
    engine.open()
    gate, entered = threading.Event(), threading.Event()

    def slow(tx: Transaction) -> None:
        entered.set()
        assert gate.wait(30)
        tx.execute("INSERT INTO facts VALUES ('done', '1')")

    task = asyncio.get_running_loop().create_task(engine.write(slow))
    await asyncio.to_thread(entered.wait, 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.set()
    await engine.write(put("after"))
    assert engine.row("SELECT 1 FROM facts WHERE key = 'done'") == (1,)
    engine.close()


async def test_a_closed_engine_refuses(path: Path) -> None:
    engine = Engine(path)
    with pytest.raises(Unavailable):
        engine.rows("SELECT 1")
    engine.open()
    engine.close()
    with pytest.raises(Unavailable):
        await engine.write(put("a"))


async def test_sequences_never_repeat(path: Path) -> None:
    engine = Engine(path)
    engine.open()
    numbers = [await engine.write(lambda tx: tx.sequence()) for _ in range(3)]
    engine.close()
    engine = Engine(path)
    engine.open()
    numbers.append(await engine.write(lambda tx: tx.sequence(), durable=False))
    engine.close()
    assert numbers == [1, 2, 3, 4]


async def test_a_snapshot_is_one_moment(path: Path) -> None:
    engine = Engine(path)
    engine.open()
    await engine.write(put("a"))
    with engine.snapshot() as view:
        assert len(view.rows("SELECT * FROM facts")) == 1
        done = threading.Event()

        def other() -> None:
            asyncio.run(engine.write(put("b")))
            done.set()

        thread = threading.Thread(target=other)
        thread.start()
        thread.join(30)
        assert done.is_set()
        assert len(view.rows("SELECT * FROM facts")) == 1
    assert len(engine.rows("SELECT * FROM facts")) == 2
    engine.close()


# Migrations.


def shape(connection: sqlite3.Connection) -> list[tuple[str, str]]:
    return connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()


@pytest.mark.parametrize("start", range(schema.VERSION + 1))
def test_every_migration_leads_to_the_same_schema(start: int) -> None:
    fresh = sqlite3.connect(":memory:", isolation_level=None)
    schema.migrate(fresh)
    old = sqlite3.connect(":memory:", isolation_level=None)
    assert schema.migrate(old, upto=start) == start
    if start:
        old.execute("INSERT INTO containers (namespace, id, image) VALUES ('ns', 'c', 'img')")
    assert schema.migrate(old) == schema.VERSION - start
    assert shape(old) == shape(fresh)
    assert schema.version(old) == schema.VERSION
    if start:
        assert old.execute("SELECT id, image FROM containers").fetchall() == [("c", "img")]
    fresh.close()
    old.close()


def test_a_migration_that_fails_leaves_the_old_version(monkeypatch: pytest.MonkeyPatch) -> None:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    monkeypatch.setattr(schema, "MIGRATIONS", (schema.MIGRATIONS[0], "CREATE TABLE extra (a); CREATE TABLE extra (a)"))
    with pytest.raises(sqlite3.OperationalError):
        schema.migrate(connection)
    assert schema.version(connection) == 1
    assert "extra" not in dict(shape(connection))
    connection.close()


def test_a_database_of_a_newer_release_is_left_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 1000")
    connection.close()
    engine, opened, connect = Engine(path), [], Engine._connect

    def keep(self: Engine) -> sqlite3.Connection:
        opened.append(connect(self))
        return opened[-1]

    monkeypatch.setattr(Engine, "_connect", keep)
    with pytest.raises(FailedPrecondition, match="newer"):
        engine.open()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        opened[0].execute("SELECT 1")


def test_every_table_is_known_to_the_salvage() -> None:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    schema.migrate(connection)
    tables = {name for name, kind in connection.execute("SELECT name, type FROM sqlite_master") if kind == "table"}
    assert tables == set(schema.TABLES)
    for table, keys in schema.TABLES.items():
        primary = [row[1] for row in connection.execute(f"PRAGMA table_info({table})") if row[5]]
        assert primary == list(keys), table
    connection.close()


# Damage.


async def fill(path: Path, count: int = 2000) -> None:
    engine = Engine(path)
    engine.open()
    await engine.write(lambda tx: [
        tx.execute("INSERT INTO cri_records VALUES ('k', ?, ?)", (f"{number:06}", b"v" * 200)) for number in range(count)
    ])
    engine.close()


async def test_p6_a_damaged_page_costs_only_its_rows(path: Path) -> None:
    await fill(path)
    data = bytearray(path.read_bytes())
    middle = len(data) // 8192 * 4096
    data[middle:middle + 4096] = b"\xff" * 4096
    path.write_bytes(data)
    engine = Engine(path)
    engine.open()
    assert engine.repair is not None
    assert engine.repair.moved_to.exists()
    saved = engine.rows("SELECT count(*) FROM cri_records")[0][0]
    assert 1000 < saved < 2000
    assert "cri_records" in engine.repair.damaged_tables
    await engine.write(put("works"))
    engine.close()
    again = Engine(path)
    again.open()
    assert again.repair is None
    again.close()


async def test_p6_lost_rows_come_back_from_the_copy(path: Path) -> None:
    await fill(path)
    engine = Engine(path)
    engine.open()
    engine.take_copy()
    engine.close()
    path.write_bytes(b"not a database" * 1000)
    engine = Engine(path)
    engine.open()
    assert engine.repair is not None
    assert engine.rows("SELECT count(*) FROM cri_records") == [(2000,)]
    assert "cri_records" in engine.repair.from_copy
    assert "completed from the last copy" in str(engine.repair)
    engine.close()


@pytest.mark.parametrize("content", [b"", b"x", b"\0" * 8192, b"SQLite format 3\0" + b"\xff" * 8000])
def test_p6_any_rubbish_opens_as_a_sound_database(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    engine = Engine(path)
    engine.open()
    assert engine.rows("SELECT count(*) FROM containers") == [(0,)]
    assert recovery.damage(path) is None
    engine.close()


def test_the_reserve_is_given_once(path: Path) -> None:
    engine = Engine(path)
    engine.open()
    reserve = path.with_name("metadata.db.reserve")
    assert reserve.stat().st_size == recovery.RESERVE
    assert recovery.give_reserve(path)
    assert not recovery.give_reserve(path)
    engine.close()
