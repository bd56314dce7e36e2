"""The local content store: what `content.LocalContent` promises."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from supervisord_ctr import durable
from supervisord_ctr.content import LocalContent
from supervisord_ctr.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Unavailable,
)


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> LocalContent:
    return LocalContent(tmp_path / "content", sync=False)


def put(store: LocalContent, data: bytes, ref: str = "r") -> str:
    with store.writer(ref) as writer:
        writer.write(data)
        return writer.commit()


def test_a_blob_is_written_and_read(store: LocalContent) -> None:
    digest = put(store, b"hello")
    assert digest == sha256(b"hello")
    assert store.info(digest).size == 5
    with store.open(digest) as blob:
        assert (blob.size, blob.read_at(3, 1), blob.read_at(9, 5)) == (5, b"ell", b"")
    assert [info.digest for info in store.walk()] == [digest]
    assert store.path(digest).stat().st_mode & 0o777 == 0o444
    assert store.statuses() == []
    store.verify(digest)


def test_the_empty_blob_is_a_blob(store: LocalContent) -> None:
    digest = put(store, b"")
    assert store.info(digest).size == 0
    assert store.damaged() == []


def test_p2_an_ingest_resumes_where_it_was(store: LocalContent) -> None:
    with store.writer("layer", total=11) as writer:
        writer.write(b"hello ")
    assert (store.status("layer").offset, store.status("layer").total) == (6, 11)
    again = LocalContent(store.root, sync=False)
    with again.writer("layer", total=11) as writer:
        assert (writer.offset, writer.digest()) == (6, sha256(b"hello "))
        writer.write(b"world")
        assert writer.commit(11, sha256(b"hello world")) == sha256(b"hello world")


def test_an_ingest_with_another_total_starts_over(store: LocalContent) -> None:
    with store.writer("layer", total=11) as writer:
        writer.write(b"hello ")
    with store.writer("layer", total=12) as writer:
        assert (writer.offset, writer.total) == (0, 12)


def test_an_unreadable_ingest_starts_over(store: LocalContent) -> None:
    with store.writer("layer") as writer:
        writer.write(b"x")
    (store.ingest_path("layer") / "startedat").write_text("yesterday")
    assert store.statuses() == []
    with store.writer("layer") as writer:
        assert writer.offset == 0


def test_two_writers_of_one_ref(store: LocalContent) -> None:
    first = store.writer("layer")
    with pytest.raises(Unavailable, match="locked"):
        store.writer("layer")
    first.close()
    first.close()
    store.writer("layer").close()


def test_a_wrong_digest_is_refused_and_the_ingest_stays(store: LocalContent) -> None:
    writer = store.writer("layer")
    writer.write(b"lie")
    with pytest.raises(FailedPrecondition, match="unexpected commit digest"):
        writer.commit(expected=sha256(b"truth"))
    assert store.status("layer").offset == 3
    assert list(store.walk()) == []
    store.writer("layer").close()


def test_a_wrong_size_is_refused(store: LocalContent) -> None:
    writer = store.writer("layer")
    writer.write(b"abc")
    with pytest.raises(FailedPrecondition, match="unexpected commit size 3, expected 4"):
        writer.commit(4)


def test_a_blob_that_exists(store: LocalContent) -> None:
    digest = put(store, b"twice")
    with pytest.raises(AlreadyExists):
        put(store, b"twice", "other")
    assert store.statuses() == []
    with pytest.raises(AlreadyExists):
        store.writer("third", expected=digest)


@pytest.mark.parametrize("algorithm", ["sha384", "sha512"])
def test_other_algorithms(store: LocalContent, algorithm: str) -> None:
    digest = f"{algorithm}:{hashlib.new(algorithm, b'x').hexdigest()}"
    with store.writer("known", expected=digest) as writer:
        writer.write(b"x")
        assert writer.commit(expected=digest) == digest
    store.delete(digest)
    with store.writer("told late") as writer:
        writer.write(b"x")
        assert writer.commit(expected=digest) == digest
    assert store.info(digest).size == 1


def test_truncate(store: LocalContent) -> None:
    with store.writer("layer") as writer:
        writer.write(b"abcdef")
        writer.truncate(2)
        assert (writer.offset, writer.digest()) == (2, sha256(b"ab"))
        with pytest.raises(OutOfRange):
            writer.truncate(3)
        writer.truncate(0)
        writer.write(b"z")
        assert writer.commit() == sha256(b"z")


def test_abort(store: LocalContent) -> None:
    writer = store.writer("layer")
    writer.write(b"abc")
    store.abort("layer")
    with pytest.raises(NotFound):
        store.status("layer")
    with pytest.raises(NotFound):
        writer.commit()
    with pytest.raises(NotFound):
        store.abort("layer")
    assert list(store.walk()) == []


def test_a_closed_writer_refuses(store: LocalContent) -> None:
    writer = store.writer("layer")
    writer.close()
    with pytest.raises(FailedPrecondition):
        writer.write(b"x")
    with pytest.raises(FailedPrecondition):
        writer.commit()


def test_close_waits_for_the_thread_that_still_writes(store: LocalContent, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = store.writer("r")
    writing, go_on = threading.Event(), threading.Event()
    write = os.write

    def slow(fd: int, data: memoryview) -> int:
        writing.set()
        go_on.wait(10)
        return write(fd, data[:1])

    monkeypatch.setattr(os, "write", slow)
    with ThreadPoolExecutor(2) as threads:
        written = threads.submit(writer.write, b"abc")
        assert writing.wait(10)
        closed = threads.submit(writer.close)
        with pytest.raises(TimeoutError):
            closed.result(0.3)
        go_on.set()
        assert written.result(10) == 3
        closed.result(10)
    monkeypatch.undo()
    assert store.status("r").offset == 3
    assert not store.held("r")


def test_delete(store: LocalContent) -> None:
    digest = put(store, b"gone")
    with store.open(digest) as blob:
        store.delete(digest)
        assert blob.read_at(4, 0) == b"gone"
    for call in (store.info, store.delete, store.open):
        with pytest.raises(NotFound):
            call(digest)


@pytest.mark.parametrize("bad", ["", "sha256:", "sha256:../../etc/passwd", "md5:" + "0" * 32, "SHA256:" + "0" * 64])
def test_bad_digests(store: LocalContent, bad: str) -> None:
    with pytest.raises(InvalidArgument):
        store.info(bad)


def test_a_hostile_ref_stays_inside(store: LocalContent) -> None:
    with store.writer("../../../etc/passwd\n") as writer:
        writer.write(b"x")
    assert [status.ref for status in store.statuses()] == ["../../../etc/passwd\n"]
    with pytest.raises(InvalidArgument):
        store.writer("")


def test_p6_damaged_entries_are_reported_and_healed(store: LocalContent) -> None:
    digest = put(store, b"good")
    path = store.path(digest)
    path.unlink()
    path.touch()
    (store.root / "blobs" / "sha256" / "stray.tmp").touch()
    (store.root / "blobs" / "md5").mkdir()
    assert sorted(entry.reason for entry in store.damaged()) == [
        "empty", "its name is not a digest", "not the folder of a known digest algorithm",
    ]
    assert list(store.walk()) == []
    with pytest.raises(NotFound, match="damaged"):
        store.info(digest)
    assert put(store, b"good") == digest
    assert store.info(digest).size == 4


def test_verify_finds_a_flipped_bit(store: LocalContent) -> None:
    digest = put(store, b"good")
    path = store.path(digest)
    os.chmod(path, 0o600)
    path.write_bytes(b"evil")
    with pytest.raises(DataLoss):
        store.verify(digest)


def test_sweep_keeps_what_is_held_or_named(store: LocalContent) -> None:
    for ref in ("keep", "drop"):
        with store.writer(ref) as writer:
            writer.write(b"x")
    held = store.writer("held")
    (store.root / "ingest" / "rubbish").mkdir()
    assert sorted(store.sweep_ingests(lambda: {"keep"})) == ["drop", "rubbish"]
    assert sorted(status.ref for status in store.statuses()) == ["held", "keep"]
    held.close()


def test_names_of_blobs_are_brought_to_disk_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    broken = [False]

    def sync_folder(path: os.PathLike[str]) -> None:
        if broken[0]:
            raise OSError(errno.EIO, "not now")
        synced.append(Path(path).name)

    monkeypatch.setattr(durable, "sync_folder", sync_folder)
    store = LocalContent(tmp_path / "content")
    for number in range(3):
        with store.writer(f"r{number}") as writer:
            writer.write(bytes([number]))
            writer.commit(sync_name=False)
    assert synced == []
    broken[0] = True
    with pytest.raises(OSError, match="not now"):
        store.sync_names()
    broken[0] = False
    store.sync_names()
    store.sync_names()
    assert synced == ["sha256"]
    put(store, b"another")
    assert synced == ["sha256", "sha256"]


def test_32_writers_side_by_side(store: LocalContent) -> None:
    def one(number: int) -> str:
        with store.writer(f"ref-{number}") as writer:
            for _ in range(16):
                writer.write(bytes([number]) * 65536)
            return writer.commit()

    with ThreadPoolExecutor(32) as pool:
        digests = list(pool.map(one, range(32)))
    assert sorted(info.digest for info in store.walk()) == sorted(digests)
    assert digests[7] == sha256(bytes([7]) * (16 * 65536))
