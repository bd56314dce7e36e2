"""Images through CRI: pulled, named, told, removed."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator

import grpc
import pytest

from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from tests.support.cri import Cri, running_cri
from tests.support.daemon import wait_until


@pytest.fixture(scope="module")
def cri() -> Iterator[Cri]:
    with running_cri() as made:
        yield made


def status(cri: Cri, name: str, *, verbose: bool = False) -> pb.ImageStatusResponse:
    return cri.images.ImageStatus(pb.ImageStatusRequest(image=pb.ImageSpec(image=name), verbose=verbose), timeout=60)


def remove(cri: Cri, name: str) -> None:
    cri.images.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=name)), timeout=60)


def test_an_image_goes_by_tag_digest_and_id(cri: Cri) -> None:
    name = cri.registry.add("test/names:1", {"User": "1000:7", "Labels": {"a": "b"}})
    image_id = cri.pull(name)
    assert image_id.startswith("sha256:")
    told = status(cri, name, verbose=True)
    assert told.image.id == image_id
    assert told.image.repo_tags == [name]
    [by_digest] = told.image.repo_digests
    assert by_digest.startswith(name.rpartition(":")[0] + "@sha256:")
    assert (told.image.uid.value, told.image.username) == (1000, "")
    assert told.image.size > 0
    assert json.loads(told.info["info"])["imageSpec"]["config"]["Labels"] == {"a": "b"}
    for other in (image_id, by_digest, image_id.partition(":")[2][:12], image_id[:20]):
        assert status(cri, other).image.id == image_id, other
    assert cri.pull(name) == image_id
    assert cri.pull(by_digest) == image_id
    remove(cri, image_id)
    for other in (name, image_id, by_digest):
        assert not status(cri, other).HasField("image")
    remove(cri, image_id)


def test_two_tags_are_one_image(cri: Cri) -> None:
    names = [cri.registry.add(f"test/tags:{tag}", {"Env": ["SAME=1"]}) for tag in ("a", "b")]
    ids = {cri.pull(name) for name in names}
    assert len(ids) == 1
    listed = [image for image in cri.images.ListImages(pb.ListImagesRequest()).images if image.id in ids]
    assert [sorted(image.repo_tags) for image in listed] == [sorted(names)]
    pages = list(cri.images.StreamImages(pb.StreamImagesRequest()))
    assert ids <= {image.id for page in pages for image in page.images}
    remove(cri, names[0])
    assert not status(cri, names[1]).HasField("image")


def test_a_tag_that_moved_leaves_the_old_image_by_id(cri: Cri) -> None:
    name = cri.registry.add("test/moving:1", {"Env": ["V=1"]})
    old = cri.pull(name)
    cri.registry.add("test/moving:1", {"Env": ["V=2"]})
    new = cri.pull(name)
    assert new != old
    assert status(cri, name).image.id == new
    assert status(cri, old).image.repo_tags == []
    remove(cri, old)
    remove(cri, new)


def test_what_is_not_there_is_not_found(cri: Cri) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        cri.pull(f"{cri.registry.host}/no/such:image")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert "no/such:image" in caught.value.details()
    with pytest.raises(grpc.RpcError) as caught:
        cri.pull("UPPER/case:bad ref")
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert not status(cri, "localhost:1/nothing:here").HasField("image")


@pytest.mark.parametrize("form", ["fields", "encoded", "server"])
def test_credentials_of_the_request_are_used(cri: Cri, form: str) -> None:
    name = cri.registry.add(f"test/private-{form}:1", {"Env": [f"FORM={form}"]})
    cri.registry.login = "user:secret"
    try:
        with pytest.raises(grpc.RpcError) as caught:
            cri.pull(name)
        assert caught.value.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
        with pytest.raises(grpc.RpcError):
            cri.pull(name, username="user", password="wrong")
        with pytest.raises(grpc.RpcError):
            cri.pull(name, username="user", password="secret", server_address="https://elsewhere.example")
        if form == "fields":
            cri.pull(name, username="user", password="secret")
        elif form == "encoded":
            cri.pull(name, auth=base64.b64encode(b"user:secret").decode())
        else:
            cri.pull(name, username="user", password="secret", server_address=f"http://{cri.registry.host}")
    finally:
        cri.registry.login = ""
    remove(cri, name)


def test_file_system_usage_is_told(cri: Cri) -> None:
    cri.pull()

    def used() -> int:
        [usage] = cri.images.ImageFsInfo(pb.ImageFsInfoRequest()).image_filesystems
        assert usage.fs_id.mountpoint.startswith(str(cri.daemon.root))
        return int(usage.used_bytes.value)

    wait_until(lambda: used() > 100_000, "layers are counted", 60)


def test_an_image_that_another_client_removes_is_gone_here_too(cri: Cri) -> None:
    from supervisord_ctr.api.services.images.v1 import images_pb2, images_pb2_grpc

    name = cri.registry.add("test/foreign:1", {"Env": ["FOREIGN=1"]})
    image_id = cri.pull(name)
    [by_digest] = status(cri, name).image.repo_digests
    with cri.daemon.channel() as channel:
        stub = images_pb2_grpc.ImagesStub(channel)
        for each in (name, by_digest, image_id):
            stub.Delete(images_pb2.DeleteImageRequest(name=each), metadata=(("containerd-namespace", "k8s.io"),))
    wait_until(lambda: not status(cri, image_id).HasField("image"), "the image is gone", 60)
