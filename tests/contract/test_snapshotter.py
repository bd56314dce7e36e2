"""What every snapshotter promises (`snapshots.Snapshotter`), run against each implementation.

The proxy one talks over a real socket to our own service, with overlayfs behind it: so the suite
also runs through gRPC and through the namespaced layer.
"""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from supervisord_ctr.api.services.snapshots.v1.snapshots_pb2_grpc import add_SnapshotsServicer_to_server
from supervisord_ctr.errors import AlreadyExists, Error, FailedPrecondition, InvalidArgument, NotFound
from supervisord_ctr.linux.mounts import temp_mount
from supervisord_ctr.model import SnapshotInfo, SnapshotKind, Usage
from supervisord_ctr.rpc import RpcServer
from supervisord_ctr.services.remote import GrpcRemote
from supervisord_ctr.services.snapshots import SnapshotsService
from supervisord_ctr.snapshots import Snapshotter
from supervisord_ctr.snapshots.proxy import ProxySnapshotter
from tests.support.stores import open_stores


@pytest.fixture(params=["overlayfs", "native", "proxy"])
async def snapshotter(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Snapshotter]:
    async with open_stores(tmp_path / "stores") as stores:
        if request.param != "proxy":
            yield stores.overlay if request.param == "overlayfs" else stores.native
            return
        address = tmp_path / "s.sock"
        server = RpcServer(address)
        server.add(
            "containerd.services.snapshots.v1.Snapshots", add_SnapshotsServicer_to_server,
            SnapshotsService(stores.database),
        )
        await server.start()
        proxy = ProxySnapshotter(
            "remote", GrpcRemote(str(address)), remote_name="overlayfs", capabilities=stores.overlay.capabilities
        )
        await proxy.open()
        yield proxy
        await proxy.close()
        await server.stop(1.0)


async def layer(
    snapshotter: Snapshotter, name: str, files: dict[str, str | None], parent: str = "", folder: Path | None = None
) -> None:
    """Commit `name` on `parent` with these changes; None deletes."""
    with temp_mount(await snapshotter.prepare(f"{name}-work", parent), folder) as target:
        for path, text in files.items():
            file = Path(target) / path
            if text is None:
                file.unlink()
            else:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
    await snapshotter.commit(name, f"{name}-work")


def tree(root: str | Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): path.read_text() for path in sorted(Path(root).rglob("*")) if path.is_file()
    }


async def test_layers_stack(snapshotter: Snapshotter) -> None:
    await layer(snapshotter, "one", {"a": "1", "dir/b": "1"})
    await layer(snapshotter, "two", {"a": "2", "dir/c": "2"}, "one")
    await layer(snapshotter, "three", {"dir/b": None, "d": "3"}, "two")
    with temp_mount(await snapshotter.view("look", "three")) as target:
        assert tree(target) == {"a": "2", "dir/c": "2", "d": "3"}
        with pytest.raises(OSError, match="Read-only"):
            (Path(target) / "x").write_text("no")
    with temp_mount(await snapshotter.prepare("run", "two")) as target:
        assert tree(target) == {"a": "2", "dir/b": "1", "dir/c": "2"}
        (Path(target) / "x").write_text("yes")
    with temp_mount(await snapshotter.mounts("run")) as target:
        assert (Path(target) / "x").read_text() == "yes"
    with temp_mount(await snapshotter.view("first", "one")) as target:
        assert tree(target) == {"a": "1", "dir/b": "1"}


async def test_stat_in_every_state(snapshotter: Snapshotter) -> None:
    await snapshotter.prepare("active", "", {"containerd.io/snapshot/x": "y"})
    info = await snapshotter.stat("active")
    assert (info.name, info.parent, info.kind) == ("active", "", SnapshotKind.ACTIVE)
    assert info.labels["containerd.io/snapshot/x"] == "y"
    assert info.created_at > 0
    await snapshotter.commit("layer", "active", {"containerd.io/snapshot/z": "w"})
    with pytest.raises(NotFound):
        await snapshotter.stat("active")
    info = await snapshotter.stat("layer")
    assert (info.kind, dict(info.labels)) == (SnapshotKind.COMMITTED, {"containerd.io/snapshot/z": "w"})
    await snapshotter.view("view", "layer")
    info = await snapshotter.stat("view")
    assert (info.kind, info.parent) == (SnapshotKind.VIEW, "layer")


async def test_keys_and_names_share_one_space(snapshotter: Snapshotter) -> None:
    await layer(snapshotter, "layer", {"a": "1"})
    await snapshotter.prepare("key", "layer")
    for key in ("key", "layer"):
        with pytest.raises(AlreadyExists):
            await snapshotter.prepare(key, "layer")
        with pytest.raises(AlreadyExists):
            await snapshotter.view(key, "layer")
        with pytest.raises(AlreadyExists):
            await snapshotter.commit(key if key == "layer" else "layer", "key")
    await snapshotter.commit("other", "key")
    with pytest.raises(NotFound):
        await snapshotter.commit("again", "key")


async def test_parents_must_be_committed(snapshotter: Snapshotter) -> None:
    await snapshotter.prepare("active")
    with pytest.raises(InvalidArgument):
        await snapshotter.prepare("child", "active")
    with pytest.raises(NotFound):
        await snapshotter.prepare("child", "nobody")
    with pytest.raises(NotFound):
        await snapshotter.stat("child")


async def test_only_active_ones_are_committed(snapshotter: Snapshotter) -> None:
    await layer(snapshotter, "layer", {})
    await snapshotter.view("view", "layer")
    with pytest.raises(FailedPrecondition):
        await snapshotter.commit("name", "view")
    with pytest.raises(FailedPrecondition):
        await snapshotter.commit("name", "layer")
    with pytest.raises(FailedPrecondition):
        await snapshotter.mounts("layer")
    with pytest.raises(NotFound):
        await snapshotter.stat("name")


async def test_remove_children_first(snapshotter: Snapshotter) -> None:
    await layer(snapshotter, "one", {"a": "1"})
    await layer(snapshotter, "two", {"b": "2"}, "one")
    await snapshotter.prepare("run", "two")
    await snapshotter.view("look", "two")
    for key in ("one", "two"):
        with pytest.raises(FailedPrecondition):
            await snapshotter.remove(key)
    for key in ("run", "look", "two", "one"):
        await snapshotter.remove(key)
        with pytest.raises(NotFound):
            await snapshotter.stat(key)
        with pytest.raises(NotFound):
            await snapshotter.remove(key)
    assert await snapshotter.walk() == []


async def test_a_removed_key_can_be_used_again(snapshotter: Snapshotter) -> None:
    with temp_mount(await snapshotter.prepare("key")) as target:
        (Path(target) / "old").write_text("x")
    await snapshotter.remove("key")
    with temp_mount(await snapshotter.prepare("key")) as target:
        assert tree(target) == {}


async def test_walk_filters(snapshotter: Snapshotter) -> None:
    await layer(snapshotter, "one", {})
    await snapshotter.prepare("run", "one", {"containerd.io/snapshot/tier": "web"})
    await snapshotter.view("look", "one")

    async def names(*filters: str) -> list[str]:
        return sorted(info.name for info in await snapshotter.walk(filters))

    assert await names() == ["look", "one", "run"]
    assert await names("kind==active") == ["run"]
    assert await names("kind==committed", "kind==view") == ["look", "one"]
    assert await names("parent==one") == ["look", "run"]
    assert await names('labels."containerd.io/snapshot/tier"==web') == ["run"]
    assert await names("name~=^l") == ["look"]
    with pytest.raises(InvalidArgument):
        await snapshotter.walk(["name="])


async def test_update_changes_labels_only(snapshotter: Snapshotter) -> None:
    first, second = "containerd.io/snapshot/a", "containerd.io/snapshot/b"
    await snapshotter.prepare("key", "", {first: "1", second: "2"})
    before = await snapshotter.stat("key")
    updated = await snapshotter.update(SnapshotInfo("key", labels={first: "9"}), [f"labels.{first}"])
    assert dict(updated.labels) == {first: "9", second: "2"}
    assert updated.updated_at >= before.updated_at
    assert updated.created_at == pytest.approx(before.created_at)
    updated = await snapshotter.update(SnapshotInfo("key", labels={}), [f"labels.{first}"])
    assert dict(updated.labels) == {second: "2"}
    updated = await snapshotter.update(SnapshotInfo("key", labels={first: "1"}))
    assert dict(updated.labels) == {first: "1"}
    with pytest.raises(InvalidArgument):
        await snapshotter.update(SnapshotInfo("key", parent="x"), ["parent"])
    with pytest.raises(NotFound):
        await snapshotter.update(SnapshotInfo("nobody"))


async def test_usage_is_what_was_written(snapshotter: Snapshotter) -> None:
    with temp_mount(await snapshotter.prepare("work")) as target:
        (Path(target) / "big").write_bytes(os.urandom(1 << 20))
        os.link(Path(target) / "big", Path(target) / "same")
        os.sync()
    active = await snapshotter.usage("work")
    await snapshotter.commit("layer", "work")
    committed = await snapshotter.usage("layer")
    for usage in (active, committed):
        assert 1 << 20 <= usage.size < (1 << 20) + 65536
        assert usage.inodes == 2
    await snapshotter.view("look", "layer")
    assert await snapshotter.usage("look") == Usage()
    with pytest.raises(NotFound):
        await snapshotter.usage("nobody")


async def test_rebase_onto_a_parent_at_commit(snapshotter: Snapshotter) -> None:
    await layer(snapshotter, "base", {"a": "1"})
    await layer(snapshotter, "other", {"b": "1"})
    if "rebase" not in snapshotter.capabilities:
        await snapshotter.prepare("free")
        with pytest.raises(InvalidArgument):
            await snapshotter.commit("top", "free", parent="base")
        return
    with temp_mount(await snapshotter.prepare("free")) as target:
        (Path(target) / "c").write_text("2")
    with pytest.raises(Error):
        await snapshotter.commit("top", "free", parent="nobody")
    await snapshotter.commit("top", "free", parent="base")
    assert (await snapshotter.stat("top")).parent == "base"
    with pytest.raises(FailedPrecondition):
        await snapshotter.remove("base")
    with temp_mount(await snapshotter.view("look", "top")) as target:
        assert tree(target) == {"a": "1", "c": "2"}


async def test_attributes_survive_the_copy_up(snapshotter: Snapshotter) -> None:
    with temp_mount(await snapshotter.prepare("work")) as target:
        root = Path(target)
        (root / "file").write_text("x")
        os.chown(root / "file", 1234, 5678)
        os.chmod(root / "file", 0o4711)
        os.setxattr(root / "file", "user.note", b"kept")
        os.symlink("nowhere/\xfcber", root / "link")
        os.mkfifo(root / "fifo", 0o640)
        os.mknod(root / "null", 0o620 | stat.S_IFCHR, os.makedev(1, 3))
        with open(root / "sparse", "wb") as sparse:
            sparse.truncate(1 << 20)
            sparse.seek(1 << 19)
            sparse.write(b"middle")
        (root / "dir").mkdir()
        os.chmod(root / "dir", 0o1777)
        os.utime(root / "dir", (1000, 2000))
    await snapshotter.commit("layer", "work")
    with temp_mount(await snapshotter.prepare("run", "layer")) as target:
        root = Path(target)
        found = os.lstat(root / "file")
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 5678, 0o4711)
        assert os.getxattr(root / "file", "user.note") == b"kept"
        assert os.readlink(root / "link") == "nowhere/\xfcber"
        assert stat.S_ISFIFO(os.lstat(root / "fifo").st_mode)
        assert os.lstat(root / "null").st_rdev == os.makedev(1, 3)
        assert os.stat(root / "sparse").st_blocks * 512 < 1 << 18
        assert (root / "sparse").read_bytes()[1 << 19:][:6] == b"middle"
        assert (os.stat(root / "dir").st_mode & 0o7777, os.stat(root / "dir").st_mtime) == (0o1777, 2000)


async def test_the_root_of_a_layer_keeps_its_owner(snapshotter: Snapshotter) -> None:
    with temp_mount(await snapshotter.prepare("work")) as target:
        os.chown(target, 4242, 4243)
    await snapshotter.commit("layer", "work")
    with temp_mount(await snapshotter.prepare("run", "layer")) as target:
        assert (os.stat(target).st_uid, os.stat(target).st_gid) == (4242, 4243)


async def test_forty_layers(snapshotter: Snapshotter) -> None:
    parent = ""
    for number in range(40):
        await layer(snapshotter, f"layer-{number}", {f"f{number}": str(number)}, parent)
        parent = f"layer-{number}"
    with temp_mount(await snapshotter.prepare("run", parent)) as target:
        assert len(tree(target)) == 40


async def test_mappings_own_the_root(snapshotter: Snapshotter) -> None:
    labels = {
        "containerd.io/snapshot/uidmapping": "0:100000:65536", "containerd.io/snapshot/gidmapping": "0:200000:65536",
    }
    with temp_mount(await snapshotter.prepare("run", "", labels)) as target:
        assert (os.stat(target).st_uid, os.stat(target).st_gid) == (100000, 200000)
    with pytest.raises(InvalidArgument):
        await snapshotter.prepare("bad", "", {"containerd.io/snapshot/uidmapping": "zero"})
    with pytest.raises(NotFound):
        await snapshotter.stat("bad")


async def test_cleanup_is_harmless(snapshotter: Snapshotter) -> None:
    await layer(snapshotter, "layer", {"a": "1"})
    await snapshotter.prepare("run", "layer")
    await snapshotter.cleanup()
    with temp_mount(await snapshotter.mounts("run")) as target:
        assert tree(target) == {"a": "1"}
