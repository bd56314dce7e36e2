"""OCI image conformance: the same images unpacked by our daemon and by containerd are the same trees.

Every image is pulled by both. The snapshot of its top layer must carry the chain ID of the image
specification on both sides, and what a view of it shows is compared entry by entry: kind, mode,
owner, size, time, device number, link target, extended attributes, hard links, content.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import stat
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from supervisord_ctr.api.services.snapshots.v1 import snapshots_pb2
from supervisord_ctr.api.services.snapshots.v1.snapshots_pb2_grpc import SnapshotsStub
from supervisord_ctr.linux.mounts import temp_mount
from supervisord_ctr.model import Mount
from tests.support import images
from tests.support.cri import Cri
from tests.support.images import (
    BuiltImage,
    character,
    digest_of,
    fifo,
    file,
    folder,
    hard_link,
    layer,
    opaque,
    symlink,
    whiteout,
)
from tests.support.peers import CONTAINERD, OURS, Peers

METADATA = (("containerd-namespace", "k8s.io"),)

BASE = layer(
    folder("dir"), file("dir/one", b"1"), file("dir/two", b"2"), folder("dir/sub"), file("dir/sub/deep", b"deep"),
    folder("other"), file("other/file", b"other"), symlink("link", "dir/one"), symlink("dangling", "/no/where"),
)

CASES: dict[str, Sequence[bytes]] = {
    "kinds": [layer(
        folder("d", 0o1777), file("f", b"content", mode=0o4755), file("g", mode=0o2711), file("empty", b""),
        symlink("l", "../f"), hard_link("h", "f"), fifo("p", mode=0o600), character("c", 1, 3, mode=0o666),
        file("owned", uid=1000, gid=2000), file("far", uid=2_000_000, gid=3_000_000), file("old", mtime=1),
    )],
    "a file is removed": [BASE, layer(whiteout("dir/one"))],
    "a folder is removed": [BASE, layer(whiteout("dir"))],
    "a link is removed, not what it names": [BASE, layer(whiteout("link"))],
    "what is not there is removed": [BASE, layer(whiteout("dir/none"))],
    "removed and made again": [BASE, layer(whiteout("dir")), layer(folder("dir", 0o700), file("dir/new", b"new"))],
    "an opaque folder": [BASE, layer(folder("dir"), opaque("dir"), file("dir/new", b"new"))],
    "an opaque marker after its entries": [BASE, layer(folder("dir"), file("dir/new", b"new"), opaque("dir"))],
    "an opaque folder below": [BASE, layer(folder("dir/sub", 0o711), opaque("dir/sub"))],
    "a folder becomes a file": [BASE, layer(file("dir", b"now a file"))],
    "a file becomes a folder": [BASE, layer(folder("dir/one"), file("dir/one/inner", b"inner"))],
    "a link becomes a folder": [BASE, layer(folder("link"), file("link/inner", b"inner"))],
    "a folder becomes a link": [BASE, layer(symlink("other", "dir"))],
    "attributes of a folder change alone": [BASE, layer(folder("dir", 0o700, uid=5, gid=6, mtime=1_234_567_890))],
    "a file is replaced": [BASE, layer(file("dir/one", b"longer than it was", mode=0o600, uid=7))],
    "hard links in a layer": [layer(
        folder("a"), file("a/first", b"shared"), hard_link("a/second", "a/first"), hard_link("third", "a/first"))],
    "parents that no entry names": [layer(file("made/by/nobody/file", b"x"))],
    "the same name twice": [layer(file("twice", b"first"), file("twice", b"second", mode=0o600))],
    "names": [layer(
        file("with space"), file("ünïcödé/文件"), file("a" * 200 + "/" + "b" * 200), file("./dotted"),
        file("trailing.wh.dots"), file("new\nline"))],
    "attributes": [layer(
        file("x", pax={"SCHILY.xattr.user.word": "value", "SCHILY.xattr.user.empty": ""}),
        folder("d", pax={"SCHILY.xattr.user.of-folder": "1"}),
        file("capable", mode=0o755, pax={"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x04\x00\x00"
                                         + "\x00" * 12}))],
    "fractions of a second": [layer(file("x", mtime=1_600_000_000.25), folder("d", mtime=1_500_000_000.5))],
    "an empty layer between": [BASE, layer(), layer(file("last"))],
    "many layers": [BASE, *(layer(folder("dir"), file(f"dir/{n}", str(n).encode()), whiteout(f"dir/{n - 1}"))
                            for n in range(1, 12))],
    "times of folders survive what comes into them": [
        layer(folder("t", mtime=1_000_000_000)), layer(file("t/new")), layer(folder("t", mtime=1_100_000_000), file("t/n"))],
}


def chain_of(diff_ids: Sequence[str]) -> str:
    """The chain ID, by the words of the image specification."""
    chain = diff_ids[0]
    for diff_id in diff_ids[1:]:
        chain = digest_of(f"{chain} {diff_id}".encode())
    return chain


def view(cri: Cri, chain: str, tmp: Path, look: Callable[[Path], Any]) -> Any:
    """What `look` returns for the mounted tree of a committed snapshot."""
    key = f"view-{hashlib.sha256(os.urandom(8)).hexdigest()[:12]}"
    with grpc.insecure_channel(f"unix:{cri.daemon.address}") as channel:
        stub = SnapshotsStub(channel)
        told = stub.Stat(
            snapshots_pb2.StatSnapshotRequest(snapshotter="overlayfs", key=chain), metadata=METADATA, timeout=60).info
        assert (told.name, told.kind) == (chain, snapshots_pb2.COMMITTED)
        made = stub.View(snapshots_pb2.ViewSnapshotRequest(snapshotter="overlayfs", key=key, parent=chain,
                                                           labels={"containerd.io/gc.root": "now"}), metadata=METADATA,
                         timeout=60)
        try:
            with temp_mount([Mount(m.type, m.source, tuple(m.options), m.target) for m in made.mounts], tmp) as place:
                return look(Path(place))
        finally:
            stub.Remove(snapshots_pb2.RemoveSnapshotRequest(snapshotter="overlayfs", key=key), metadata=METADATA)


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything that can be seen of every entry below `root`; times of what no entry names are left out."""
    found: dict[str, tuple[object, ...]] = {}
    links: dict[int, str] = {}
    for place, folders, files in os.walk(root):
        folders.sort()
        for name in sorted([*folders, *files]):
            path = os.path.join(place, name)
            about = os.lstat(path)
            content: object = ""
            if stat.S_ISREG(about.st_mode):
                content = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            elif stat.S_ISLNK(about.st_mode):
                content = os.readlink(path)
            first = path
            if about.st_nlink > 1 and not stat.S_ISDIR(about.st_mode):
                first = links.setdefault(about.st_ino, path)
            extended = sorted(
                (key, os.getxattr(path, key, follow_symlinks=False)) for key in os.listxattr(path, follow_symlinks=False))
            found[os.path.relpath(path, root)] = (
                oct(about.st_mode), about.st_uid, about.st_gid, 0 if stat.S_ISDIR(about.st_mode) else about.st_size,
                about.st_mtime_ns, about.st_rdev, os.path.relpath(first, root), content, extended,
            )
    return found




def untimed(tars: Sequence[bytes]) -> set[str]:
    """Folders whose time no archive states: they were made, or changed below, without being named by that layer.

    Ours keeps the time of the layer below, containerd's has the moment of unpacking.
    """
    found: set[str] = set()
    for data in tars:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            named = {os.path.normpath(member.name) for member in archive}
        found -= named
        for name in named:
            found.update(str(parent) for parent in Path(name).parents if str(parent) not in named)
    return found


def compare(peers: Peers, tmp: Path, image: BuiltImage, name: str, tars: Sequence[bytes]) -> None:
    seen = {}
    config = json.loads(image.blobs[image.config])
    chain = chain_of(config["rootfs"]["diff_ids"])
    skipped = untimed(tars)
    for side in (CONTAINERD, OURS):
        cri = peers.get(side)
        assert cri.pull(cri.registry.publish(name, image)) == image.config
        seen[side] = view(cri, chain, tmp, tree)
    for path in sorted({*seen[OURS], *seen[CONTAINERD]}):
        ours, theirs = seen[OURS].get(path), seen[CONTAINERD].get(path)
        if path in skipped and ours and theirs:
            ours, theirs = (*ours[:4], *ours[5:]), (*theirs[:4], *theirs[5:])
        assert ours == theirs, f"{path}: ours {ours}, containerd's {theirs}"


@pytest.mark.parametrize("case", CASES)
def test_a_layer_is_unpacked_as_containerd_does(peers: Peers, tmp_path: Path, case: str) -> None:
    tars = CASES[case]
    compare(peers, tmp_path, images.build(tars), f"layers/{list(CASES).index(case)}:1", tars)


@pytest.mark.parametrize("compression", ["gzip", "zstd", ""])
def test_s_the_compression_does_not_matter(peers: Peers, tmp_path: Path, compression: str) -> None:
    tars = [BASE, layer(file("packed", compression.encode()))]
    compare(peers, tmp_path, images.build(tars, compression=compression), f"packed/{compression or 'plain'}:1", tars)


def test_an_image_of_dockers_media_types(peers: Peers, tmp_path: Path) -> None:
    tars = [BASE, layer(file("from", b"docker"))]
    compare(peers, tmp_path, images.build(tars, docker=True), "docker/types:1", tars)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_the_form_of_the_archive_does_not_matter(peers: Peers, tmp_path: Path, form: int) -> None:
    long = "" if form == tarfile.USTAR_FORMAT else "long/" + "n" * 180
    tars = [layer(folder("d"), file("d/f", b"x" * 5000), *([file(long)] if long else []), form=form)]
    compare(peers, tmp_path, images.build(tars), f"forms/{form}:1", tars)


def test_an_image_that_umoci_made(peers: Peers, tmp_path: Path) -> None:
    layout, content, mount = tmp_path / "layout", tmp_path / "content", tmp_path / "mount"
    (content / "etc").mkdir(parents=True)
    mount.mkdir()
    (content / "etc" / "one").write_text("1")
    (content / "etc" / "two").write_text("2")
    os.link(content / "etc" / "one", content / "etc" / "same")
    os.setxattr(content / "etc" / "two", "user.mark", b"m")
    target = f"{layout}:made"
    for words in (
        ("init", "--layout", str(layout)), ("new", "--image", target), ("insert", "--image", target, str(content), "/"),
        ("insert", "--image", target, "--whiteout", "/etc/two"),
        ("insert", "--image", target, "--opaque", str(content / "etc"), "/etc"),
    ):
        subprocess.run(["umoci", *words], check=True, capture_output=True, timeout=120)
    blobs = {f"sha256:{path.name}": path.read_bytes() for path in (layout / "blobs" / "sha256").iterdir()}
    [entry] = json.loads((layout / "index.json").read_text())["manifests"]
    manifest = blobs[entry["digest"]]
    document = json.loads(manifest)
    index = json.dumps({"schemaVersion": 2, "mediaType": images.OCI_INDEX, "manifests": [entry]}).encode()
    image = BuiltImage(blobs, manifest, images.OCI_MANIFEST, index, [item["digest"] for item in document["layers"]],
                       document["config"]["digest"])
    compare(peers, mount, image, "umoci/made:1", [gzip.decompress(blobs[digest]) + bytes(2048) for digest in image.layers])  # umoci writes no end
