"""CRI conformance: images by name, tag, digest and ID, on our daemon and on containerd alike."""

from __future__ import annotations

import base64
import json
import secrets

import grpc
import pytest

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from tests.support.cri import Cri
from tests.support.daemon import wait_until
from tests.support.peers import beyond_containerd


def status(cri: Cri, name: str, *, verbose: bool = False) -> pb.ImageStatusResponse:
    return cri.images.ImageStatus(pb.ImageStatusRequest(image=pb.ImageSpec(image=name), verbose=verbose), timeout=60)


def remove(cri: Cri, name: str) -> None:
    cri.images.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=name)), timeout=60)


def listed(cri: Cri, name: str = "") -> dict[str, pb.Image]:
    chosen = pb.ImageFilter(image=pb.ImageSpec(image=name)) if name else None
    return {image.id: image for image in cri.images.ListImages(pb.ListImagesRequest(filter=chosen), timeout=60).images}


def unique(cri: Cri, name: str, **config: object) -> str:
    """An image that nobody else has."""
    return cri.registry.add(name, {"Labels": {"unique": secrets.token_hex(8)}, **config})


def code(caught: pytest.ExceptionInfo[grpc.RpcError]) -> grpc.StatusCode:
    found: grpc.StatusCode = caught.value.code()
    return found


def test_an_image_goes_by_tag_digest_and_id(cri: Cri) -> None:
    name = unique(cri, "conform/names:1", User="1000:7")
    image_id = cri.pull(name)
    assert image_id.startswith("sha256:")
    told = status(cri, name, verbose=True)
    assert told.image.id == image_id
    assert list(told.image.repo_tags) == [name]
    [by_digest] = told.image.repo_digests
    assert by_digest.startswith(name.rpartition(":")[0] + "@sha256:")
    assert (told.image.uid.value, told.image.username) == (1000, "")
    assert told.image.size > 0
    details = json.loads(told.info["info"])
    assert details["chainID"].startswith("sha256:")
    assert details["imageSpec"]["config"]["User"] == "1000:7"
    for other in (image_id, by_digest, image_id.partition(":")[2], image_id.partition(":")[2][:12]):
        assert status(cri, other).image.id == image_id, other
    for other in (name, by_digest):
        assert cri.pull(other) == image_id
    remove(cri, image_id)
    for other in (name, image_id, by_digest):
        assert not status(cri, other).HasField("image"), other
    remove(cri, image_id)
    remove(cri, name)


@pytest.mark.parametrize(("user", "uid", "username"), [
    ("", None, None), ("4711", 4711, ""), ("4711:12", 4711, ""), ("user", None, "user"), ("user:extra", None, "user"),
])
def test_the_user_of_an_image(cri: Cri, user: str, uid: int | None, username: str | None) -> None:
    name = unique(cri, "conform/user:1", User=user)
    image = cri.images.ImageStatus(
        pb.ImageStatusRequest(image=pb.ImageSpec(image=cri.pull(name))), timeout=60).image
    assert image.HasField("uid") == (uid is not None)
    assert (image.uid.value, image.username) == (uid or 0, username or "")


def test_two_tags_are_one_image_and_go_together(cri: Cri) -> None:
    names = []
    mark = {"Labels": {"unique": secrets.token_hex(8)}}
    for tag in ("a", "b"):
        names.append(cri.registry.add(f"conform/tags:{tag}", mark))
    ids = {cri.pull(name) for name in names}
    assert len(ids) == 1
    [image_id] = ids
    assert sorted(listed(cri)[image_id].repo_tags) == sorted(names)
    remove(cri, names[0])
    assert not status(cri, names[1]).HasField("image"), "removing one name removes the image"
    assert image_id not in listed(cri)


@beyond_containerd("filter of the list of images; it lists all")
def test_the_filter_of_the_list_of_images(cri: Cri) -> None:
    name = unique(cri, "conform/filter:1")
    image_id = cri.pull(name)
    for word in (name, image_id):
        assert set(listed(cri, word)) == {image_id}
    assert listed(cri, "localhost:1/no/such:image") == {}


def test_a_tag_that_moved_leaves_the_old_image_by_id(cri: Cri) -> None:
    name = unique(cri, "conform/moving:1")
    old = cri.pull(name)
    unique(cri, "conform/moving:1")
    new = cri.pull(name)
    assert new != old
    assert status(cri, name).image.id == new
    assert list(status(cri, old).image.repo_tags) == []
    assert list(status(cri, new).image.repo_tags) == [name]
    remove(cri, old)
    assert status(cri, name).image.id == new
    remove(cri, new)


def test_a_pull_by_digest_has_no_tag(cri: Cri) -> None:
    name = unique(cri, "conform/digest:1")
    cri.pull(name)
    [by_digest] = status(cri, name).image.repo_digests
    remove(cri, name)
    image_id = cri.pull(by_digest)
    image = status(cri, image_id).image
    assert (list(image.repo_tags), list(image.repo_digests)) == ([], [by_digest])
    remove(cri, by_digest)
    assert image_id not in listed(cri)


def test_what_is_not_there(cri: Cri) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        cri.pull(f"{cri.registry.host}/no/such:image")
    assert code(caught) == grpc.StatusCode.NOT_FOUND
    for name in (f"{cri.registry.host}/no/such:image", "sha256:" + "f" * 64, "f" * 64):
        assert not status(cri, name).HasField("image"), name
        remove(cri, name)
    for name in ("UPPER/case:1", "a b"):
        with pytest.raises(grpc.RpcError):
            cri.pull(name)


@pytest.mark.parametrize("form", ["fields", "auth"])
def test_credentials_of_the_request(cri: Cri, form: str) -> None:
    name = unique(cri, f"conform/private:{form}")
    cri.registry.login = "someone:secret"
    right = ({"username": "someone", "password": "secret"} if form == "fields"
             else {"auth": base64.b64encode(b"someone:secret").decode()})
    try:
        for wrong in ({}, {"username": "someone", "password": "guess"}):
            with pytest.raises(grpc.RpcError):
                cri.pull(name, **wrong)
        assert cri.pull(name, **right).startswith("sha256:")
    finally:
        cri.registry.login = ""


def test_an_image_in_use_may_be_removed_and_the_container_runs_on(cri: Cri) -> None:
    name = unique(cri, "conform/used:1")
    image_id = cri.pull(name)
    pod, config = cri.run_pod()
    asked = cri.container_config("sleep 600")
    asked.image.image = name
    container = cri.create(pod, config, asked)
    cri.start(container)
    remove(cri, image_id)
    assert not status(cri, name).HasField("image")
    assert cri.exec(container, "cat", "/data/sub/file").stdout == b"content of the image\n"
    assert cri.status(container).state == pb.CONTAINER_RUNNING


def test_a_container_takes_its_image_by_every_name(cri: Cri) -> None:
    name = unique(cri, "conform/by:1")
    image_id = cri.pull(name)
    [by_digest] = status(cri, name).image.repo_digests
    pod, config = cri.run_pod()
    for number, other in enumerate((name, by_digest, image_id, image_id.partition(":")[2])):
        asked = cri.container_config("true", name=f"c{number}")
        asked.image.image = other
        told = cri.status(cri.create(pod, config, asked))
        assert told.image_ref == by_digest
        assert told.image.image == name, other


def test_file_system_usage_is_told(cri: Cri) -> None:
    cri.pull()

    def told() -> pb.FilesystemUsage | None:
        """Usage is measured now and then, every 10 seconds by default."""
        [about] = cri.images.ImageFsInfo(pb.ImageFsInfoRequest(), timeout=60).image_filesystems
        return about if about.used_bytes.value > 0 else None

    about = wait_until(told, "the image is counted")
    assert about.fs_id.mountpoint.startswith(str(cri.daemon.base))
    assert about.timestamp > 0
    assert about.inodes_used.value > 0
