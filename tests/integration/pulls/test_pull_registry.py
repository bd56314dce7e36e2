"""Pulls from a registry in memory: what arrives, what is refused, and what dropped lines cost."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import threading
from pathlib import Path

import pytest

from supervisord_ctr.diff.stream import Limits
from supervisord_ctr.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from supervisord_ctr.images.config import read_config
from supervisord_ctr.images.pull import PullRequest
from supervisord_ctr.linux.mounts import temp_mount
from supervisord_ctr.model import Platform
from supervisord_ctr.names import LABEL_UNCOMPRESSED
from tests.support.fake_registry import (
    FakeRegistry,
    Handler,
    Seen,
)
from tests.support.images import (
    OCI_INDEX,
    OCI_MANIFEST,
    Member,
    build,
    digest_of,
    file,
    folder,
    hard_link,
    layer,
    small_image,
    symlink,
    whiteout,
)
from tests.support.pulling import NAMESPACE, Pulling, open_pulling, refused


async def files_of(pulling: Pulling, chain: str, snapshotter: str = "overlayfs") -> dict[str, str]:
    """Name and text of every regular file that the snapshot shows."""
    snapshots = pulling.database.snapshotter(snapshotter)
    mounts = await snapshots.view(NAMESPACE, "look", chain)

    def read() -> dict[str, str]:
        with temp_mount(mounts, pulling.puller.scratch) as place:
            return {
                str(path.relative_to(place)): path.read_text() for path in sorted(Path(place).rglob("*"))
                if path.is_file() and not path.is_symlink()
            }

    found = await asyncio.to_thread(read)
    await snapshots.remove(NAMESPACE, "look")
    return found


# What arrives.

@pytest.mark.parametrize("snapshotter", ["overlayfs", "native"])
@pytest.mark.parametrize("compression", ["gzip", "zstd", ""])
async def test_a_pull_unpacks_and_labels(
    pulling: Pulling, registry: FakeRegistry, snapshotter: str, compression: str
) -> None:
    tars = [
        layer(folder("etc"), file("etc/name", b"one"), file("etc/gone", b"x"), folder("d"), file("d/old", b"o")),
        layer(folder("etc"), whiteout("etc/gone"), file("etc/new", b"two"), hard_link("etc/again", "etc/new")),
        layer(Member("d/.wh..wh..opq"), file("d/fresh", b"three")),
    ]
    made = build(tars, compression=compression, config={"Env": ["A=b"]})
    image = await pulling.pull(registry.add("library/app", "v1", made), snapshotter=snapshotter)
    assert (image.name, image.target.digest) == (f"{registry.address}/library/app:v1", made.target)
    config = await read_config(pulling.database, NAMESPACE, image)
    assert config.env == ("A=b",)
    assert await files_of(pulling, config.chain_ids()[-1], snapshotter) == {
        "etc/name": "one", "etc/new": "two", "etc/again": "two", "d/fresh": "three",
    }
    content = pulling.database.content
    index = await content.info(NAMESPACE, made.target)
    manifest = await content.info(NAMESPACE, digest_of(made.manifest))
    source = {f"containerd.io/distribution.source.{registry.address.partition(':')[0]}": "library/app"}
    assert dict(index.labels) == {"containerd.io/gc.ref.content.m.0": digest_of(made.manifest), **source}
    assert dict(manifest.labels) == {
        "containerd.io/gc.ref.content.config": made.config, **source,
        **{f"containerd.io/gc.ref.content.l.{i}": digest for i, digest in enumerate(made.layers)},
    }
    for digest, tar in zip(made.layers, tars, strict=True):
        info = await content.info(NAMESPACE, digest)
        assert dict(info.labels) == {LABEL_UNCOMPRESSED: digest_of(tar), **source}
    labels = (await content.info(NAMESPACE, made.config)).labels
    assert labels[f"containerd.io/gc.ref.snapshot.{snapshotter}"] == config.chain_ids()[-1]
    left = await pulling.left()
    assert left == {"images": [image.name], "snapshots": left["snapshots"], "leases": []}
    assert sorted(left["snapshots"]) == sorted(config.chain_ids())


async def test_implied_directories_keep_the_lower_layers_attributes(pulling: Pulling, registry: FakeRegistry) -> None:
    made = build([
        layer(folder("a", 0o710, uid=7, mtime=1000), folder("a/b", 0o1777, gid=9, mtime=2000)),
        layer(file("a/b/file", b"x"), file("fresh/file", b"y")),
    ])
    image = await pulling.pull(registry.add("app", "v1", made))
    config = await read_config(pulling.database, NAMESPACE, image)
    mounts = await pulling.database.snapshotter("overlayfs").view(NAMESPACE, "look", config.chain_ids()[-1])

    def read() -> list[tuple[int, int, int]]:
        with temp_mount(mounts, pulling.puller.scratch) as place:
            found = [os.stat(f"{place}/{name}") for name in ("a", "a/b", "fresh")]
            return [(stat.S_IMODE(s.st_mode), s.st_uid, s.st_gid) for s in found]

    assert await asyncio.to_thread(read) == [(0o710, 7, 0), (0o1777, 0, 9), (0o755, 0, 0)]


async def test_layers_that_lean_on_lower_ones_come_out_right(pulling: Pulling, registry: FakeRegistry) -> None:
    made = build([
        layer(folder("usr"), folder("usr/lib"), symlink("lib", "usr/lib"), file("tool", b"tool")),
        layer(file("lib/module", b"m"), hard_link("link", "tool")),
    ])
    image = await pulling.pull(registry.add("app", "v1", made))
    config = await read_config(pulling.database, NAMESPACE, image)
    found = await files_of(pulling, config.chain_ids()[-1])
    assert found == {"usr/lib/module": "m", "tool": "tool", "link": "tool"}
    assert len((await pulling.left())["snapshots"]) == 2


async def test_a_second_pull_downloads_no_blob(pulling: Pulling, registry: FakeRegistry) -> None:
    name = registry.add("app", "v1", small_image())
    await pulling.pull(name)
    before = len(registry.requests("/blobs/"))
    await pulling.pull(name)
    assert len(registry.requests("/blobs/")) == before
    assert len(registry.requests("/manifests/v1")) == 2


async def test_pulls_of_the_same_image_join(pulling: Pulling, registry: FakeRegistry) -> None:
    made = small_image()
    name = registry.add("app", "v1", made)
    gate = threading.Event()

    def wait(handler: Handler, seen: Seen) -> bool:
        if "/manifests/v1" in seen.path:
            gate.wait(30)
        return False

    registry.rules.append(wait)
    pulls = [asyncio.ensure_future(pulling.pull(name)) for _ in range(5)]
    while not registry.requests("/manifests/v1"):
        await asyncio.sleep(0.01)
    assert [running.reference for running in pulling.puller.running()] == [name]
    gate.set()
    images = await asyncio.gather(*pulls)
    assert {image.target.digest for image in images} == {made.target}
    assert len(registry.requests("/manifests/v1")) == 1
    assert pulling.puller.running() == []


async def test_images_that_share_layers_fetch_them_once(pulling: Pulling, registry: FakeRegistry) -> None:
    base = layer(folder("base"), file("base/data", os.urandom(300_000)))
    made = [build([base, layer(file(f"own-{i}"))]) for i in range(6)]
    names = [registry.add(f"app{i}", "v1", image) for i, image in enumerate(made)]
    await asyncio.gather(*(pulling.pull(name) for name in names))
    assert len(registry.requests(made[0].layers[0])) == 1
    assert len((await pulling.left())["snapshots"]) == 7


async def test_the_same_layer_twice_in_an_image(pulling: Pulling, registry: FakeRegistry) -> None:
    empty = layer(folder("etc"))
    image = await pulling.pull(registry.add("app", "v1", build([empty, layer(file("etc/a")), empty, empty])))
    config = await read_config(pulling.database, NAMESPACE, image)
    assert await files_of(pulling, config.chain_ids()[-1]) == {"etc/a": "content"}


async def test_platforms_are_chosen_from_an_index(pulling: Pulling, registry: FakeRegistry) -> None:
    here = small_image("here")
    there = build([layer(file("other"))], platform={"architecture": "s390x"})
    entries = json.loads(here.index)["manifests"] + json.loads(there.index)["manifests"]
    index = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()
    registry.add("app", "one", here)
    registry.add("app", "two", there)
    registry.manifests[("app", "v1")] = (index, OCI_INDEX)
    name = f"{registry.address}/app:v1"
    await pulling.pull(name)
    assert not registry.requests(there.layers[0])
    await pulling.pull(name, platforms=[Platform("linux", "s390x")], unpack=False)
    assert len(registry.requests(there.layers[0])) == 1
    with pytest.raises(NotFound, match=r"no match for platform linux/riscv64 .* it has linux/.*linux/s390x"):
        await pulling.pull(name, platforms=[Platform("linux", "riscv64")])


async def test_all_platforms(pulling: Pulling, registry: FakeRegistry) -> None:
    here, there = small_image("a"), build([layer(file("other"))], platform={"architecture": "s390x"})
    entries = json.loads(here.index)["manifests"] + json.loads(there.index)["manifests"]
    registry.add("app", "one", here)
    registry.add("app", "two", there)
    index = json.dumps({"schemaVersion": 2, "manifests": entries}).encode()
    registry.manifests[("app", "v1")] = (index, OCI_INDEX)
    request = PullRequest(f"{registry.address}/app:v1", all_platforms=True, unpacks=((None, "overlayfs"),))
    await pulling.puller.run(NAMESPACE, request)
    for digest in (*here.layers, *there.layers):
        await pulling.database.content.info(NAMESPACE, digest)
    assert len((await pulling.left())["snapshots"]) == len(here.layers)


async def test_by_digest_and_docker_manifests(pulling: Pulling, registry: FakeRegistry) -> None:
    made = build([layer(file("f"))], docker=True)
    registry.add("app", "v1", made)
    image = await pulling.pull(f"{registry.address}/app@{digest_of(made.manifest)}")
    assert image.target.media_type == "application/vnd.docker.distribution.manifest.v2+json"
    assert image.name == f"{registry.address}/app@{digest_of(made.manifest)}"


async def test_p10_progress_tells_of_every_blob(pulling: Pulling, registry: FakeRegistry) -> None:
    made = small_image()
    name = registry.add("app", "v1", made)
    await pulling.pull(name)
    events = [(p.event, p.descriptor.digest) for p in pulling.progress if p.descriptor is not None]
    for digest in made.layers:
        assert [event for event, of in events if of == digest][0] == "waiting"
        assert [event for event, of in events if of == digest][-1] == "extracted"
    assert pulling.progress[0].event == f"Resolving from OCI Registry ({name})"
    assert pulling.progress[-1].event == f"Completed pull from OCI Registry ({name})"
    manifest = next(p for p in pulling.progress if p.descriptor and p.descriptor.digest == digest_of(made.manifest))
    assert manifest.parents == (f"index-{made.target}",)


async def test_an_image_is_unpacked_later(pulling: Pulling, registry: FakeRegistry) -> None:
    image = await pulling.pull(registry.add("app", "v1", small_image()), unpack=False)
    assert (await pulling.left())["snapshots"] == []
    await pulling.puller.unpack(NAMESPACE, image, "overlayfs")
    await pulling.puller.unpack(NAMESPACE, image, "overlayfs")
    await pulling.puller.unpack(NAMESPACE, image, "native")
    assert len((await pulling.left())["snapshots"]) == 4


# Refusals.

@pytest.mark.parametrize("snapshotter", ["overlayfs", "native"])
@pytest.mark.parametrize(("members", "told"), [
    ([file("../../../etc/passwd")], "leads out of the root"),
    ([folder("a"), symlink("a", "/tmp"), file("a/pwned-by-a-layer")], "replaced a directory"),
    ([symlink("a", "/var/tmp"), file("a/pwned-by-a-layer")], "absolute link to nothing"),
    ([hard_link("x", "../../etc/shadow")], "leads out of the root"),
    ([file("f", uid=1 << 31)], "outside 0 to"),
])
async def test_s1_hostile_layers(
    pulling: Pulling, registry: FakeRegistry, members: list[Member], told: str, snapshotter: str
) -> None:
    for position in (0, 1):
        tars = [layer(folder("ok"), file("ok/f"))]
        tars.insert(position, layer(*members))
        name = registry.add(f"bad{position}", "v1", build(tars))
        await refused(pulling, name, InvalidArgument, told, snapshotter=snapshotter)
    assert not os.path.exists("/tmp/pwned-by-a-layer")
    assert not os.path.exists("/var/tmp/pwned-by-a-layer")


async def test_s8_a_bomb(tmp_path: Path, registry: FakeRegistry) -> None:
    name = registry.add("bomb", "v1", build([layer(file("zeros", bytes(8 << 20)))]))
    async with open_pulling(tmp_path / "s", limits=Limits(ratio=20, ratio_from=1 << 20)) as pulling:
        await refused(pulling, name, InvalidArgument, "more than 20 times")


async def test_a_cut_gzip_stream(pulling: Pulling, registry: FakeRegistry) -> None:
    made = build([layer(*(file(f"f{i}", os.urandom(4000)) for i in range(9)))])
    short = made.blobs[made.layers[0]][:-3000]
    manifest = json.loads(made.manifest)
    manifest["layers"][0].update(digest=digest_of(short), size=len(short))
    body = json.dumps(manifest).encode()
    registry.add("app", "v1", made)
    registry.blobs[digest_of(short)] = short
    registry.manifests[("app", "v1")] = (body, OCI_MANIFEST)
    await refused(pulling, f"{registry.address}/app:v1", InvalidArgument, "middle of its compressed stream")


async def test_a_wrong_digest(pulling: Pulling, registry: FakeRegistry) -> None:
    made = small_image()
    name = registry.add("app", "v1", made)
    body = bytearray(registry.blobs[made.layers[0]])
    body[-9] ^= 1
    registry.blobs[made.layers[0]] = bytes(body)
    with pytest.raises((FailedPrecondition, InvalidArgument)):
        await pulling.pull(name)
    assert await pulling.left() == {"images": [], "snapshots": [], "leases": []}


async def test_a_diff_id_that_lies(pulling: Pulling, registry: FakeRegistry) -> None:
    made = build([layer(file("f"))], diff_ids=["sha256:" + "0" * 64])
    await refused(pulling, registry.add("app", "v1", made), InvalidArgument, "wrong diff id")


async def test_a_config_with_another_number_of_layers(pulling: Pulling, registry: FakeRegistry) -> None:
    tar = layer(file("f"))
    made = build([tar], diff_ids=[digest_of(tar)] * 2)
    await refused(pulling, registry.add("app", "v1", made), InvalidArgument, "1 layers, but its configuration lists 2")


@pytest.mark.parametrize(("served", "told"), [
    (OCI_MANIFEST, "the document says it is"), ("text/html", "is not an image's"),
    ("application/vnd.docker.distribution.manifest.v1+prettyjws", "schema 1"),
])
async def test_s15_the_media_type_must_fit(pulling: Pulling, registry: FakeRegistry, served: str, told: str) -> None:
    made = small_image()
    name = registry.add("app", "v1", made)
    registry.manifests[("app", "v1")] = (made.index, served)
    await refused(pulling, name, InvalidArgument, told)


async def test_s15_an_ambiguous_document(pulling: Pulling, registry: FakeRegistry) -> None:
    made = small_image()
    name = registry.add("app", "v1", made)
    both = {**json.loads(made.index), "layers": json.loads(made.manifest)["layers"]}
    registry.manifests[("app", "v1")] = (json.dumps(both).encode(), OCI_INDEX)
    await refused(pulling, name, InvalidArgument, "ambiguous")


@pytest.mark.parametrize("body", [b"{" * 100_000, b"[]", b'{"schemaVersion": 2, "manifests": {}}', b"\xff\xfe"])
async def test_s8_documents_that_are_none(pulling: Pulling, registry: FakeRegistry, body: bytes) -> None:
    registry.manifests[("app", "v1")] = (body, OCI_INDEX)
    await refused(pulling, f"{registry.address}/app:v1", InvalidArgument, "manifest")


async def test_s8_a_manifest_beyond_4_mib(pulling: Pulling, registry: FakeRegistry) -> None:
    registry.manifests[("app", "v1")] = (b" " * ((4 << 20) + 1), OCI_INDEX)
    await refused(pulling, f"{registry.address}/app:v1", InvalidArgument, "at most 4194304")


async def test_an_encrypted_layer(pulling: Pulling, registry: FakeRegistry) -> None:
    made = small_image()
    body = json.loads(made.manifest)
    body["layers"][0]["mediaType"] += "+encrypted"
    registry.add("app", "v1", made)
    registry.manifests[("app", "v1")] = (json.dumps(body).encode(), OCI_MANIFEST)
    await refused(pulling, f"{registry.address}/app:v1", InvalidArgument, "encrypted")


async def test_an_unknown_image(pulling: Pulling, registry: FakeRegistry) -> None:
    error = await refused(pulling, f"{registry.address}/no/such:v1", NotFound, "404 not found")
    assert f"http://{registry.address}" in error.message
    assert "MANIFEST_UNKNOWN" in error.message


async def test_a_registry_that_is_not_there(pulling: Pulling) -> None:
    await refused(pulling, "127.0.0.1:1/app:v1", Unavailable, "http://127.0.0.1:1: .*refused")
