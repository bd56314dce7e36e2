"""Content as a namespace sees it, over the Python objects and through gRPC."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from supervisord_ctr.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from supervisord_ctr.model import ContentInfo
from tests.support.grpc_stores import served
from tests.support.stores import Stores, open_stores


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@dataclass
class Subject:
    """What is tested, and the stores behind it."""

    content: Any
    leases: Any
    stores: Stores


@pytest.fixture(params=["objects", "grpc"])
async def subject(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Subject]:
    async with open_stores(tmp_path / "stores") as stores:
        if request.param == "objects":
            yield Subject(stores.database.content, stores.database.leases, stores)
            return
        async with served(stores, tmp_path / "s.sock") as remote:
            yield Subject(remote.content, remote.leases, stores)


async def write(content: Any, namespace: str, data: bytes, **options: Any) -> str:
    labels = options.pop("labels", None)
    writer = await content.writer(namespace, options.pop("ref", f"ref-{sha256(data)}"), **options)
    try:
        await writer.write(data)
        return str(await writer.commit(len(data), sha256(data), labels))
    finally:
        await writer.close()


async def read(content: Any, namespace: str, digest: str, count: int = 1 << 30, offset: int = 0) -> bytes:
    reader = await content.reader(namespace, digest)
    try:
        return bytes(await reader.read_at(count, offset))
    finally:
        reader.close()


async def test_write_and_read(subject: Subject) -> None:
    content = subject.content
    digest = await write(content, "ns", b"hello world", labels={"a": "1", "empty": ""})
    assert digest == sha256(b"hello world")
    info = await content.info("ns", digest)
    assert (info.size, dict(info.labels)) == (11, {"a": "1"})
    assert info.created_at == info.updated_at > 0
    assert await read(content, "ns", digest) == b"hello world"
    assert await read(content, "ns", digest, 5, 6) == b"world"
    assert await read(content, "ns", digest, 5, 11) == b""
    assert await content.statuses("ns") == []
    assert subject.stores.topics() == ["/content/create"]


async def test_p6_a_blob_that_went_from_the_disk_is_written_again(subject: Subject) -> None:
    digest = await write(subject.content, "ns", b"lost in a power cut", labels={"kept": "1"})
    subject.stores.database.content.local.path(digest).unlink()
    with pytest.raises(NotFound):
        await read(subject.content, "ns", digest)
    with pytest.raises(AlreadyExists):
        await write(subject.content, "ns", b"lost in a power cut", expected=digest, size=19)
    assert await read(subject.content, "ns", digest) == b"lost in a power cut"
    assert dict((await subject.content.info("ns", digest)).labels) == {"kept": "1"}


async def test_large_blobs_come_in_pieces(subject: Subject) -> None:
    data = bytes(range(256)) * 20_000
    digest = await write(subject.content, "ns", data)
    assert await read(subject.content, "ns", digest) == data


async def test_many_small_reads_keep_no_deleted_file_open(subject: Subject) -> None:
    digest = await write(subject.content, "ns", bytes(range(256)) * 16)
    for offset in range(0, 4096, 64):
        assert await read(subject.content, "ns", digest, 64, offset) == bytes(range(offset % 256, offset % 256 + 64))
    opened = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.lexists(
        f"/proc/self/fd/{fd}")]
    assert sum(digest.removeprefix("sha256:") in name for name in opened) <= 1
    await subject.content.delete("ns", digest)
    await subject.stores.database.gc.collect()
    opened = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.lexists(
        f"/proc/self/fd/{fd}")]
    assert not any(digest.removeprefix("sha256:") in name for name in opened)


async def test_p2_an_ingest_resumes(subject: Subject) -> None:
    content = subject.content
    writer = await content.writer("ns", "layer", size=11)
    await writer.write(b"hello ")
    await writer.close()
    status = await content.status("ns", "layer")
    assert (status.ref, status.offset, status.total) == ("layer", 6, 11)
    writer = await content.writer("ns", "layer", size=11, expected=sha256(b"hello world"))
    assert (writer.offset, writer.digest()) == (6, sha256(b"hello "))
    await writer.write(b"world")
    status = await writer.status()
    assert (status.offset, status.total) == (11, 11)
    assert status.started_at > 0
    assert await writer.commit(11, sha256(b"hello world")) == sha256(b"hello world")
    await writer.close()
    with pytest.raises(NotFound):
        await content.status("ns", "layer")


async def test_truncate_begins_again(subject: Subject) -> None:
    writer = await subject.content.writer("ns", "layer")
    await writer.write(b"wrong")
    await writer.truncate(0)
    await writer.write(b"right")
    assert await writer.commit(5, sha256(b"right")) == sha256(b"right")
    await writer.close()


async def test_a_held_ref_is_unavailable_in_its_namespace_only(subject: Subject) -> None:
    first = await subject.content.writer("ns", "layer")
    with pytest.raises(Unavailable, match="locked"):
        await subject.content.writer("ns", "layer")
    other = await subject.content.writer("elsewhere", "layer")
    await other.close()
    await first.close()

    # A stream of gRPC ends on the server a moment after the client closed it.
    for _ in range(500):
        try:
            again = await subject.content.writer("ns", "layer")
        except Unavailable:
            await asyncio.sleep(0.01)
            continue
        await again.close()
        return
    pytest.fail("the ref stayed locked")


async def test_wrong_sizes_and_digests_are_refused_and_the_ingest_stays(subject: Subject) -> None:
    content = subject.content
    for size, expected in ((4, ""), (0, sha256(b"truth"))):
        writer = await content.writer("ns", f"lie-{size}")
        await writer.write(b"lie")
        with pytest.raises(FailedPrecondition):
            await writer.commit(size, expected)
        await writer.close()
        assert (await content.status("ns", f"lie-{size}")).offset == 3
    assert await content.walk("ns") == []


async def test_a_blob_of_the_namespace_exists(subject: Subject) -> None:
    content = subject.content
    digest = await write(content, "ns", b"twice")
    with pytest.raises(AlreadyExists):
        await content.writer("ns", "other", expected=digest)
    with pytest.raises(AlreadyExists):
        await write(content, "ns", b"twice", ref="unannounced")
    assert await content.statuses("ns") == []


async def test_a_blob_of_another_namespace_is_shared(subject: Subject) -> None:
    content = subject.content
    digest = await write(content, "one", b"shared", labels={"whose": "one"})
    with pytest.raises(NotFound):
        await content.info("two", digest)
    with pytest.raises(NotFound):
        await read(content, "two", digest)
    writer = await content.writer("two", "ref", size=6, expected=digest)
    assert writer.offset == 6
    assert await writer.commit(6, digest, {"whose": "two"}) == digest
    await writer.close()
    assert await read(content, "two", digest) == b"shared"
    assert dict((await content.info("one", digest)).labels) == {"whose": "one"}
    assert dict((await content.info("two", digest)).labels) == {"whose": "two"}
    await content.delete("one", digest)
    assert await read(content, "two", digest) == b"shared"
    with pytest.raises(NotFound):
        await content.info("one", digest)


@pytest.fixture(params=["objects", "grpc"])
async def isolated(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Subject]:
    async with open_stores(tmp_path / "stores", isolated=True) as stores:
        if request.param == "objects":
            yield Subject(stores.database.content, stores.database.leases, stores)
            return
        async with served(stores, tmp_path / "s.sock") as remote:
            yield Subject(remote.content, remote.leases, stores)


async def test_an_isolated_namespace_must_send_what_another_one_has(isolated: Subject) -> None:
    content = isolated.content
    digest = await write(content, "one", b"secret")
    writer = await content.writer("two", "ref", size=6, expected=digest)
    assert (writer.offset, writer.digest()) == (0, sha256(b""))
    with pytest.raises(FailedPrecondition):
        await writer.commit(6, digest)
    await writer.close()
    with pytest.raises(NotFound):
        await read(content, "two", digest)
    writer = await content.writer("two", "again", size=6, expected=digest)
    await writer.write(b"secret")
    assert await writer.commit(6, digest, {"whose": "two"}) == digest
    await writer.close()
    assert await read(content, "two", digest) == b"secret"
    assert dict((await content.info("two", digest)).labels) == {"whose": "two"}
    await content.delete("one", digest)
    assert await read(content, "two", digest) == b"secret"


async def test_a_namespace_can_be_labelled_to_share(isolated: Subject) -> None:
    content, namespaces = isolated.content, isolated.stores.database.namespaces
    digest = await write(content, "base", b"shared")
    await namespaces.update("base", {"containerd.io/namespace.shareable": "yes"})
    writer = await content.writer("two", "ref", expected=digest)
    assert writer.offset == 0
    await writer.close()
    await namespaces.update("base", {"containerd.io/namespace.shareable": "true"})
    writer = await content.writer("three", "ref", size=6, expected=digest)
    assert writer.offset == 6
    assert await writer.commit(6, digest) == digest
    await writer.close()
    assert await read(content, "three", digest) == b"shared"


async def test_a_shared_blob_can_be_written_anew(subject: Subject) -> None:
    content = subject.content
    digest = await write(content, "one", b"shared")
    writer = await content.writer("two", "ref", expected=digest)
    await writer.truncate(0)
    await writer.write(b"other")
    await writer.close()
    assert (await content.status("two", "ref")).offset == 5
    assert await read(content, "one", digest) == b"shared"


async def test_a_shared_ingest_can_be_aborted(subject: Subject) -> None:
    content = subject.content
    digest = await write(content, "one", b"shared")
    writer = await content.writer("two", "ref", expected=digest)
    await writer.close()
    await content.abort("two", "ref")
    with pytest.raises(NotFound):
        await content.abort("two", "ref")
    assert await read(content, "one", digest) == b"shared"


async def test_statuses_and_abort(subject: Subject) -> None:
    content = subject.content
    for ref in ("a/1", "a/2", "b"):
        writer = await content.writer("ns", ref)
        await writer.write(ref.encode())
        await writer.close()
    assert [status.ref for status in await content.statuses("ns")] == ["a/1", "a/2", "b"]
    assert [status.ref for status in await content.statuses("ns", ["ref~=^a/"])] == ["a/1", "a/2"]
    assert await content.statuses("elsewhere") == []
    await content.abort("ns", "a/1")
    with pytest.raises(NotFound):
        await content.abort("ns", "a/1")
    with pytest.raises(NotFound):
        await content.abort("elsewhere", "b")
    assert [status.ref for status in await content.statuses("ns")] == ["a/2", "b"]
    with pytest.raises(InvalidArgument):
        await content.writer("ns", "")


async def test_update_labels(subject: Subject) -> None:
    content = subject.content
    digest = await write(content, "ns", b"x", labels={"a": "1", "b": "2"})

    async def change(labels: dict[str, str], *paths: str) -> dict[str, str]:
        return dict((await content.update("ns", ContentInfo(digest, 0, labels=labels), paths)).labels)

    assert await change({"a": "9", "c": "ignored"}, "labels.a") == {"a": "9", "b": "2"}
    assert await change({}, "labels.a") == {"b": "2"}
    assert await change({"x.y": "z"}, "labels.x.y") == {"b": "2", "x.y": "z"}
    assert await change({"only": "1"}, "labels") == {"only": "1"}
    assert await change({}) == {}
    with pytest.raises(InvalidArgument):
        await change({}, "size")
    with pytest.raises(InvalidArgument):
        await change({"k": "v" * 5000})
    with pytest.raises(NotFound):
        await content.update("ns", ContentInfo(sha256(b"nothing"), 0))


async def test_walk_filters(subject: Subject) -> None:
    content = subject.content
    one = await write(content, "ns", b"1", labels={"tier": "web"})
    two = await write(content, "ns", b"2", labels={"tier": "db"})
    three = await write(content, "ns", b"3")
    assert sorted(info.digest for info in await content.walk("ns")) == sorted([one, two, three])
    assert [info.digest for info in await content.walk("ns", ["labels.tier==db"])] == [two]
    assert {info.digest for info in await content.walk("ns", [f"digest=={one}", f"digest=={three}"])} == {one, three}
    assert await content.walk("elsewhere") == []
    assert await content.walk("ns", ["size"]) == await content.walk("ns", ["size==1"]) == []
    with pytest.raises(InvalidArgument):
        await content.walk("ns", ["labels.tier="])


@pytest.mark.parametrize("bad", ["", "sha256:x", "md5:d41d8cd98f00b204e9800998ecf8427e", "sha256:" + "A" * 64])
async def test_bad_digests(subject: Subject, bad: str) -> None:
    for work in (
        subject.content.info("ns", bad), subject.content.delete("ns", bad),
        subject.content.update("ns", ContentInfo(bad, 0)),
    ):
        with pytest.raises(InvalidArgument):
            await work


async def test_labels_that_are_too_long_are_refused_at_commit(subject: Subject) -> None:
    writer = await subject.content.writer("ns", "ref")
    await writer.write(b"x")
    with pytest.raises(InvalidArgument, match="greater than maximum size"):
        await writer.commit(1, sha256(b"x"), {"k" * 100: "v" * 4000})
    await writer.close()


async def test_leases_hold_ingests_then_blobs(subject: Subject) -> None:
    content, leases = subject.content, subject.leases
    await leases.create("ns", "pull")
    writer = await content.writer("ns", "ref", lease="pull")
    assert [(item.type, item.id) for item in await leases.list_resources("ns", "pull")] == [("ingests", "ref")]
    await writer.write(b"x")
    digest = await writer.commit(1, sha256(b"x"))
    await writer.close()
    assert [(item.type, item.id) for item in await leases.list_resources("ns", "pull")] == [("content", digest)]
    await leases.create("ns", "second")
    with pytest.raises(AlreadyExists):
        await content.writer("ns", "again", expected=digest, lease="second")
    assert [(item.type, item.id) for item in await leases.list_resources("ns", "second")] == [("content", digest)]
    await content.delete("ns", digest, lease="second")
    assert await leases.list_resources("ns", "second") == []
    with pytest.raises(NotFound):
        await content.writer("ns", "ref", lease="nobody")


async def test_32_writers_of_different_refs(subject: Subject) -> None:
    async def one(number: int) -> str:
        return await write(subject.content, "ns", bytes([number]) * 300_000, ref=f"ref-{number}")

    digests = await asyncio.gather(*(one(number) for number in range(32)))
    assert digests[5] == sha256(bytes([5]) * 300_000)
    assert sorted(info.digest for info in await subject.content.walk("ns")) == sorted(digests)
