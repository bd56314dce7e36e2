"""Containers, images, leases, namespaces and sandboxes, over the Python objects and through gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from supervisord_ctr.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unimplemented
from supervisord_ctr.model import Container, Descriptor, Image, LeaseResource, Runtime, Sandbox, TypedValue
from tests.support.grpc_stores import served
from tests.support.stores import Stores, open_stores

DIGEST = "sha256:" + "ab" * 32
OTHER = "sha256:" + "cd" * 32
SPEC = TypedValue("types.containerd.io/opencontainers/runtime-spec/1/Spec", b'{"ociVersion":"1.1.0"}')


class Subject:
    def __init__(self, view: Any, stores: Stores) -> None:
        self.containers, self.images, self.leases = view.containers, view.images, view.leases
        self.namespaces, self.sandboxes = view.namespaces, view.sandboxes
        self.stores = stores


@pytest.fixture(params=["objects", "grpc"])
async def subject(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Subject]:
    async with open_stores(tmp_path / "stores") as stores:
        if request.param == "objects":
            yield Subject(stores.database, stores)
            return
        async with served(stores, tmp_path / "s.sock") as remote:
            yield Subject(remote, stores)


def container(id: str = "c1", **changes: Any) -> Container:  # noqa: A002
    made = Container(
        id, {"app": "web", "io.example/tier.x": "1"}, "docker.io/library/busybox:latest",
        Runtime("io.containerd.runc.v2", TypedValue("opts", b"\x08\x01")), SPEC, "overlayfs", "key",
        extensions={"ext": TypedValue("t", b"\x00\xff")}, sandbox="box",
    )
    return replace(made, **changes)


async def test_a_container_comes_back_as_it_was(subject: Subject) -> None:
    made = await subject.containers.create("ns", container())
    found = await subject.containers.get("ns", "c1")
    assert found == made
    assert replace(found, created_at=0.0, updated_at=0.0) == container()
    assert found.created_at == found.updated_at > 0
    assert subject.stores.topics() == ["/containers/create"]
    with pytest.raises(AlreadyExists):
        await subject.containers.create("ns", container())
    await subject.containers.create("other", container())
    assert [namespace.name for namespace in await subject.namespaces.list()] == ["ns", "other"]


@pytest.mark.parametrize("changes", [
    {"id": ""}, {"id": "a/b"}, {"id": "x" * 77}, {"id": "-a"}, {"id": "a--b"}, {"id": "ä"},
    {"runtime": Runtime("")}, {"snapshotter": ""}, {"labels": {"k" * 4000: "v" * 100}}, {"labels": {"": "v"}},
    {"extensions": {"": TypedValue("t", b"v")}},
])
async def test_bad_containers(subject: Subject, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        await subject.containers.create("ns", container(**changes))
    assert await subject.containers.list("ns") == []
    assert subject.stores.topics() == []


async def test_container_fields(subject: Subject) -> None:
    await subject.containers.create("ns", container())

    async def change(wanted: Container, *paths: str) -> Container:
        changed: Container = await subject.containers.update("ns", wanted, paths)
        assert changed == await subject.containers.get("ns", "c1")
        assert changed.updated_at >= changed.created_at > 0
        return changed

    wanted = container(
        labels={"app": "db", "new": "1"}, image="img", spec=TypedValue("s2", b"2"), snapshot_key="k2",
        extensions={"ext": TypedValue("t2", b"2"), "more": TypedValue("t3", b"3")},
    )
    assert dict((await change(wanted, "labels.app")).labels) == {"app": "db", "io.example/tier.x": "1"}
    assert dict((await change(container(labels={}), "labels.io.example/tier.x")).labels) == {"app": "db"}
    assert dict((await change(wanted, "labels")).labels) == {"app": "db", "new": "1"}
    assert set((await change(wanted, "extensions.more")).extensions) == {"ext", "more"}
    assert (await change(wanted, "extensions.ext")).extensions["ext"] == TypedValue("t2", b"2")
    assert (await change(wanted, "image", "snapshotkey")).snapshot_key == "k2"
    assert (await change(wanted, "spec")).spec == TypedValue("s2", b"2")
    assert (await change(container())).labels == container().labels
    for bad in (replace(wanted, snapshotter="native"), replace(wanted, runtime=Runtime("other"))):
        with pytest.raises(InvalidArgument, match="immutable"):
            await change(bad)
    for path in ("id", "snapshotter", "runtime", "created_at", "nonsense"):
        with pytest.raises(InvalidArgument):
            await change(wanted, path)
    with pytest.raises(NotFound):
        await subject.containers.update("ns", container("nobody"))
    with pytest.raises(InvalidArgument):
        await subject.containers.update("ns", container(""))


async def test_a_container_may_come_without_a_spec(subject: Subject) -> None:
    """containerd takes one from its clients; a change then has to bring it, unless it replaces everything."""
    made = await subject.containers.create("ns", container(spec=None))
    assert made.spec is None
    assert await subject.containers.get("ns", "c1") == made
    for path in ("labels", "image", "labels.app"):
        with pytest.raises(InvalidArgument, match="spec must be set"):
            await subject.containers.update("ns", container(image="new"), [path])
    assert (await subject.containers.update("ns", container(spec=None))).spec is None
    assert (await subject.containers.update("ns", container(), ["spec", "labels"])).spec == SPEC
    assert (await subject.containers.update("ns", container(image="new"), ["image"])).image == "new"


async def test_errors_name_what_was_asked_for(subject: Subject) -> None:
    with pytest.raises(NotFound, match='container "c1" in namespace "ns": not found'):
        await subject.containers.get("ns", "c1")
    with pytest.raises(NotFound, match='cannot update container "c1" in namespace "ns"'):
        await subject.containers.update("ns", container())
    with pytest.raises(NotFound, match='cannot delete container "c1" in namespace "ns"'):
        await subject.containers.delete("ns", "c1")
    with pytest.raises(NotFound, match='image "i": not found'):
        await subject.images.delete("ns", "i")
    with pytest.raises(NotFound, match='lease "l": not found'):
        await subject.leases.delete("ns", "l")


async def test_container_lists(subject: Subject) -> None:
    for number in range(3):
        await subject.containers.create(
            "ns", container(f"c{number}", labels={"n": str(number), "a.b/c": "x"}, image=f"image-{number}")
        )

    async def ids(*filters: str) -> list[str]:
        return [found.id for found in await subject.containers.list("ns", filters)]

    assert await ids() == ["c0", "c1", "c2"]
    assert await ids("labels.n==1") == ["c1"]
    assert await ids('labels."a.b/c"==x,image==image-2') == ["c2"]
    assert await ids("id==c0", "id==c2") == ["c0", "c2"]
    assert await ids("id~=^c[12]$") == ["c1", "c2"]
    assert await ids("runtime.name==io.containerd.runc.v2,id!=c0") == ["c1", "c2"]
    assert await ids("runtime") == []
    assert [found.id for found in await subject.containers.list("elsewhere")] == []
    with pytest.raises(InvalidArgument):
        await ids("labels.n==")


async def test_container_delete(subject: Subject) -> None:
    await subject.containers.create("ns", container())
    subject.stores.topics()
    with pytest.raises(NotFound):
        await subject.containers.delete("other", "c1")
    await subject.containers.delete("ns", "c1")
    for work in (subject.containers.delete("ns", "c1"), subject.containers.get("ns", "c1")):
        with pytest.raises(NotFound):
            await work
    assert subject.stores.topics() == ["/containers/delete"]


def image(name: str = "docker.io/library/busybox:latest", **changes: Any) -> Image:
    target = Descriptor("application/vnd.oci.image.index.v1+json", DIGEST, 123, {"note": "x"})
    return replace(Image(name, target, {"app": "web"}), **changes)


async def test_an_image_comes_back_as_it_was(subject: Subject) -> None:
    made = await subject.images.create("ns", image())
    assert await subject.images.get("ns", made.name) == made
    assert replace(made, created_at=0.0, updated_at=0.0) == image()
    assert subject.stores.topics() == ["/images/create"]
    with pytest.raises(AlreadyExists):
        await subject.images.create("ns", image())
    with pytest.raises(NotFound):
        await subject.images.get("other", made.name)


@pytest.mark.parametrize("changes", [
    {"name": ""}, {"target": Descriptor("t", "bad", 1)}, {"target": Descriptor("t", DIGEST, 0)},
    {"target": Descriptor("", DIGEST, 1)}, {"labels": {"k": "v" * 5000}}, {"labels": {"": "v"}},
    {"target": Descriptor("t", DIGEST, 1, {"": "v"})},
])
async def test_bad_images(subject: Subject, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        await subject.images.create("ns", image(**changes))
    assert await subject.images.list("ns") == []


async def test_image_fields(subject: Subject) -> None:
    name = (await subject.images.create("ns", image())).name

    async def change(wanted: Image, *paths: str) -> Image:
        changed: Image = await subject.images.update("ns", wanted, paths)
        assert changed == await subject.images.get("ns", name)
        return changed

    wanted = image(labels={"app": "db", "more": "1"}, target=Descriptor("other", OTHER, 9, {"note": "y", "n": "m"}))
    assert dict((await change(wanted, "labels.more")).labels) == {"app": "web", "more": "1"}
    assert dict((await change(image(labels={}), "labels.more")).labels) == {"app": "web"}
    changed = await change(wanted, "annotations.note")
    assert (changed.target.digest, dict(changed.target.annotations)) == (DIGEST, {"note": "y"})
    assert dict((await change(wanted, "annotations")).target.annotations) == {"note": "y", "n": "m"}
    assert (await change(wanted, "target")).target == wanted.target
    assert dict((await change(wanted, "labels")).labels) == {"app": "db", "more": "1"}
    changed = await change(image())
    assert replace(changed, created_at=0.0, updated_at=0.0) == image()
    for path in ("name", "target.digest", "created_at"):
        with pytest.raises(InvalidArgument):
            await change(wanted, path)
    with pytest.raises(NotFound):
        await subject.images.update("ns", image("nobody"))
    with pytest.raises(InvalidArgument):
        await subject.images.update("ns", image(target=Descriptor("t", "bad", 1)), ["target"])
    assert set(subject.stores.topics()) == {"/images/create", "/images/update"}


async def test_image_lists(subject: Subject) -> None:
    await subject.images.create("ns", image("a", labels={"n": "1"}))
    await subject.images.create("ns", image("b", target=Descriptor("x", OTHER, 1)))

    async def names(*filters: str) -> list[str]:
        return [found.name for found in await subject.images.list("ns", filters)]

    assert await names() == ["a", "b"]
    assert await names("name==b") == ["b"]
    assert await names(f"target.digest=={DIGEST}") == ["a"]
    assert await names("target.mediatype==x", "labels.n") == ["a", "b"]
    assert await names("annotations.note==x") == ["a"]
    with pytest.raises(InvalidArgument):
        await names("name=")


async def test_image_delete(subject: Subject) -> None:
    await subject.images.create("ns", image("a"))
    with pytest.raises(NotFound, match="has target"):
        await subject.images.delete("ns", "a", target_digest=OTHER)
    await subject.images.delete("ns", "a", target_digest=DIGEST)
    with pytest.raises(NotFound):
        await subject.images.delete("ns", "a")
    assert subject.stores.topics() == ["/images/create", "/images/delete"]


async def test_leases(subject: Subject) -> None:
    made = await subject.leases.create("ns", "one", {"a": "1"})
    assert (made.id, dict(made.labels)) == ("one", {"a": "1"})
    with pytest.raises(AlreadyExists):
        await subject.leases.create("ns", "one")
    random = await subject.leases.create("ns")
    assert random.id
    assert sorted(lease.id for lease in await subject.leases.list("ns")) == sorted(["one", random.id])
    assert [lease.id for lease in await subject.leases.list("ns", ["labels.a==1"])] == ["one"]
    assert [lease.id for lease in await subject.leases.list("ns", ["id==one"])] == ["one"]
    assert await subject.leases.list("other") == []
    await subject.leases.delete("ns", "one")
    with pytest.raises(NotFound):
        await subject.leases.delete("ns", "one")


async def test_p2_a_lease_gives_way_to_one_that_holds_less(tmp_path: Path) -> None:
    async with open_stores(tmp_path / "stores") as stores:
        leases = stores.database.leases
        blob, other = (LeaseResource("content", f"sha256:{digit * 64}") for digit in "ab")
        await leases.create("ns", "one", {"a": "1"})
        await leases.add_resource("ns", "one", LeaseResource("snapshots/overlayfs", "s"))
        await leases.reduce("ns", "one", "left", "content", {"b": "2"})
        assert await leases.list("ns") == [], "nothing was left to protect"
        for held in (blob, other):
            await leases.create("ns", "one", {"a": "1"})
            for resource in (held, LeaseResource("snapshots/overlayfs", "s"), LeaseResource("ingests", "i")):
                await leases.add_resource("ns", "one", resource)
            await leases.reduce("ns", "one", "left", "content", {"b": "2"})
        assert [(lease.id, lease.labels) for lease in await leases.list("ns")] == [("left", {"b": "2"})]
        assert await leases.list_resources("ns", "left") == [blob, other]
        with pytest.raises(NotFound):
            await leases.reduce("ns", "one", "left", "content", {})
        await leases.create("ns", "two")
        await leases.delete("ns", "two", also="left")
        await leases.create("ns", "two")
        await leases.delete("ns", "two", also="left")
        assert await leases.list("ns") == []


async def test_lease_resources(subject: Subject) -> None:
    leases = subject.leases
    await leases.create("ns", "one")
    resources = [
        LeaseResource("content", DIGEST), LeaseResource("images", "busybox"), LeaseResource("ingests", "ref"),
        LeaseResource("snapshots/overlayfs", "key"),
    ]
    for resource in (*resources, resources[0]):
        await leases.add_resource("ns", "one", resource)
    assert await leases.list_resources("ns", "one") == resources
    await leases.delete_resource("ns", "one", resources[1])
    await leases.delete_resource("ns", "one", resources[1])
    assert len(await leases.list_resources("ns", "one")) == 3
    for kind, key in (("content", "bad"), ("content/x", DIGEST), ("snapshots", "key"), ("snapshots/a/b", "key"),
                      ("snapshots/", "key"), ("snapshots/overlayfs", ""), ("images", ""), ("ingests", "")):
        with pytest.raises(InvalidArgument):
            await leases.add_resource("ns", "one", LeaseResource(kind, key))
    await leases.delete_resource("ns", "one", LeaseResource("images", ""))
    with pytest.raises(Unimplemented):
        await leases.add_resource("ns", "one", LeaseResource("containers", "c"))
    for work in (
        leases.add_resource("ns", "nobody", resources[0]), leases.delete_resource("ns", "nobody", resources[0]),
        leases.list_resources("ns", "nobody"),
    ):
        with pytest.raises(NotFound):
            await work


async def test_namespaces(subject: Subject) -> None:
    namespaces = subject.namespaces
    assert dict((await namespaces.create("ns", {"a": "1"})).labels) == {"a": "1"}
    with pytest.raises(AlreadyExists):
        await namespaces.create("ns")
    assert dict((await namespaces.get("nobody")).labels) == {}
    assert dict((await namespaces.update("ns", {"b": "2", "c": "x"}, ["labels.b"])).labels) == {"a": "1", "b": "2"}
    await namespaces.update("ns", {}, ["labels.a"])
    assert dict((await namespaces.get("ns")).labels) == {"b": "2"}
    await namespaces.update("ns", {"only": "1"})
    assert dict((await namespaces.get("ns")).labels) == {"only": "1"}
    for path in ("name", "labels"):
        with pytest.raises(InvalidArgument):
            await namespaces.update("ns", {}, [path])
    for bad in ("", "a/b", "a" * 77, "-"):
        with pytest.raises(InvalidArgument):
            await namespaces.create(bad)
    await namespaces.delete("ns")
    with pytest.raises(NotFound):
        await namespaces.delete("ns")
    topics = subject.stores.topics()
    assert (topics[0], topics[-1], set(topics[1:-1])) == (
        "/namespaces/create", "/namespaces/delete", {"/namespaces/update"}
    )


async def test_a_namespace_must_be_empty(subject: Subject) -> None:
    database = subject.stores.database
    await subject.containers.create("ns", container())
    await subject.images.create("ns", image())
    digest = await subject.stores.blob("ns", b"x")
    await database.snapshotter("overlayfs").prepare("ns", "key")
    await subject.leases.create("ns", "lease")
    with pytest.raises(FailedPrecondition) as caught:
        await subject.namespaces.delete("ns")
    assert "images, blobs, containers, snapshots on \"overlayfs\" snapshotter" in caught.value.message
    await subject.containers.delete("ns", "c1")
    await subject.images.delete("ns", image().name)
    await database.content.delete("ns", digest)
    await database.snapshotter("overlayfs").remove("ns", "key")
    await subject.namespaces.delete("ns")
    assert await subject.namespaces.list() == []
    assert await subject.leases.list("ns") == []


async def test_sandboxes(subject: Subject) -> None:
    sandboxes = subject.sandboxes
    box = Sandbox(
        "box", Runtime("io.containerd.runc.v2", TypedValue("o", b"1")), SPEC, {"a": "1"},
        extensions={"e": TypedValue("t", b"2")}, sandboxer="shim",
    )
    made = await sandboxes.create("ns", box)
    assert replace(made, created_at=0.0, updated_at=0.0) == box
    assert await sandboxes.get("ns", "box") == made
    with pytest.raises(AlreadyExists):
        await sandboxes.create("ns", box)
    with pytest.raises(InvalidArgument):
        await sandboxes.create("ns", replace(box, id="a b"))
    for bad in ({"extensions": {"": TypedValue("t", b"")}}, {"labels": {"": "v"}}):
        with pytest.raises(InvalidArgument):
            await sandboxes.create("ns", replace(box, id="other", **bad))
    long = {"k": "v" * 5000}
    assert dict((await sandboxes.create("elsewhere", replace(box, labels={**long, "empty": ""}))).labels) == long
    assert [found.id for found in await sandboxes.list("ns", ["labels.a==1"])] == ["box"]
    assert await sandboxes.list("ns", ["id==other"]) == []
    wanted = replace(box, labels={"a": "2", "b": "3"}, spec=TypedValue("s", b"9"), extensions={})
    assert dict((await sandboxes.update("ns", wanted, ["labels.b"])).labels) == {"a": "1", "b": "3"}
    changed = await sandboxes.update("ns", wanted, ["spec", "extensions", "labels"])
    assert (changed.spec, dict(changed.extensions), dict(changed.labels)) == (
        TypedValue("s", b"9"), {}, {"a": "2", "b": "3"}
    )
    assert await sandboxes.update("ns", box) == await sandboxes.get("ns", "box")
    for bad in (sandboxes.update("ns", box, ["id"]), sandboxes.update("ns", replace(box, runtime=Runtime("x")))):
        with pytest.raises(InvalidArgument):
            await bad
    await sandboxes.delete("ns", "box")
    for gone in (sandboxes.delete("ns", "box"), sandboxes.get("ns", "box"), sandboxes.update("ns", box)):
        with pytest.raises(NotFound):
            await gone
