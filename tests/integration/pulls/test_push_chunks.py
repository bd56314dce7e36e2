"""Pushing in pieces: because it is configured, because the registry wants it, or because it refuses more at once."""

from __future__ import annotations

import re

import pytest

from supervisord_ctr.errors import Error
from supervisord_ctr.images.hosts import HostsConfig
from supervisord_ctr.images.http import Http
from supervisord_ctr.images.push import Pusher, PushRequest
from tests.support.fake_registry import FakeRegistry, Handler, Seen, fake_registry
from tests.support.images import BuiltImage, build, digest_of, file, layer
from tests.support.pulling import NAMESPACE, Pulling
from tests.support.registry import running_registry

SIZE = 1_000_000


def image() -> BuiltImage:
    return build([layer(file("data", bytes(range(251)) * (SIZE // 251)))], compression="")


class Uploads:
    """The upload half of a registry that takes at most `most` bytes at once, and says that it wants `least`."""

    def __init__(self, registry: FakeRegistry, *, most: int = 1 << 40, least: int = 0) -> None:
        self.most, self.least = most, least
        self.sessions: dict[str, bytes] = {}
        self.patches: list[int] = []
        self.done: dict[str, bytes] = {}
        self.tags: list[str] = []
        self.unauthorized = 0
        registry.rules.append(self.answer)

    def answer(self, handler: Handler, seen: Seen) -> bool:
        if seen.method == "POST":
            name = str(len(self.sessions))
            self.sessions[name] = b""
            headers = {"OCI-Chunk-Min-Length": str(self.least)} if self.least else {}
            handler.answer(202, b"", {"Location": f"/v2/uploads/{name}?state=x", **headers})
        elif seen.method in ("PATCH", "PUT") and seen.path.startswith("/v2/uploads/"):
            self.take(handler, seen)
        elif seen.method == "PUT":
            self.tags.append(seen.path.rpartition("/")[2])
            handler.answer(201)
        elif seen.method == "HEAD":
            handler.answer(200 if seen.path.rpartition("/")[2] in self.done else 404)
        else:
            return False
        return True

    def take(self, handler: Handler, seen: Seen) -> None:
        name = seen.path.rpartition("/")[2]
        if len(seen.body) > self.most:
            handler.answer(413)
            return
        if seen.method == "PATCH":
            found = re.fullmatch(r"(\d+)-(\d+)", seen.headers["content-range"])
            assert found is not None
            assert (int(found[1]), int(found[2]) + 1 - int(found[1])) == (len(self.sessions[name]), len(seen.body))
            self.sessions[name] += seen.body
            self.patches.append(len(seen.body))
            handler.answer(202, b"", {"Location": f"/v2/uploads/{name}?state=y", "Range": f"0-{found[2]}"})
            return
        data = self.sessions[name] + seen.body
        assert seen.query["digest"] == [digest_of(data)]
        self.done[digest_of(data)] = data
        handler.answer(201)


async def pulled(pulling: Pulling, made: BuiltImage) -> None:
    """The image in the store, without a registry that the pushes would see."""
    with fake_registry() as source:
        await pulling.pull(source.add("source", "v1", made))


async def push(pulling: Pulling, reference: str, *, chunk: int = 0, default: int = 0) -> None:
    image = (await pulling.database.images.list(NAMESPACE))[0]
    http = Http()
    try:
        pusher = Pusher(pulling.database, pulling.stores.executors, http, HostsConfig(""), chunk=default)
        await pusher.push(NAMESPACE, PushRequest(reference, image, chunk=chunk, default_scheme="http"))
    finally:
        await http.close()


async def test_a_whole_blob_is_one_request(pulling: Pulling, registry: FakeRegistry) -> None:
    made, uploads = image(), Uploads(registry)
    await pulled(pulling, made)
    await push(pulling, f"{registry.address}/app:v1")
    assert (uploads.done, uploads.patches) == (made.blobs, [])
    assert uploads.tags == [digest_of(made.manifest), "v1"]
    await push(pulling, f"{registry.address}/app:v2")
    assert len(uploads.sessions) == len(made.blobs), "what is there is not sent again"


@pytest.mark.parametrize("asked", ["by the request", "by the settings"])
async def test_pieces_of_the_size_that_is_asked_for(pulling: Pulling, registry: FakeRegistry, asked: str) -> None:
    made, uploads = image(), Uploads(registry)
    await pulled(pulling, made)
    sizes = {"chunk": 300_000} if asked == "by the request" else {"default": 300_000}
    await push(pulling, f"{registry.address}/app:v1", **sizes)
    assert uploads.done == made.blobs
    assert max(uploads.patches) == 300_000
    assert sum(uploads.patches) == sum(map(len, made.blobs.values()))


async def test_the_least_that_the_registry_takes(pulling: Pulling, registry: FakeRegistry) -> None:
    made, uploads = image(), Uploads(registry, least=400_000)
    await pulled(pulling, made)
    await push(pulling, f"{registry.address}/app:v1", chunk=1000)
    assert uploads.done == made.blobs
    assert max(uploads.patches) == 400_000


async def test_what_is_too_large_at_once_goes_in_pieces(
    pulling: Pulling, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("supervisord_ctr.images.push._CHUNK", 200_000)
    made, uploads = image(), Uploads(registry, most=250_000)
    await pulled(pulling, made)
    await push(pulling, f"{registry.address}/app:v1")
    assert uploads.done == made.blobs
    assert max(uploads.patches) == 200_000
    uploads.done.clear()
    uploads.most = 100_000
    with pytest.raises(Error, match="413"):
        await push(pulling, f"{registry.address}/app:v2")


async def test_a_token_that_expired_meanwhile_costs_another_request_with_the_whole_blob(
    pulling: Pulling, registry: FakeRegistry
) -> None:
    made, uploads = image(), Uploads(registry)
    await pulled(pulling, made)

    def expired(handler: Handler, seen: Seen) -> bool:
        if seen.method == "PUT" and seen.path.startswith("/v2/uploads/") and uploads.unauthorized < 2:
            uploads.unauthorized += 1
            realm = f'Bearer realm="http://{registry.address}/token",service="r"'
            handler.answer(401, b"", {"WWW-Authenticate": realm})
            return True
        if seen.path == "/token":
            handler.answer(200, b'{"token": "t"}', {"Content-Type": "application/json"})
            return True
        return False

    registry.rules.insert(0, expired)
    await push(pulling, f"{registry.address}/app:v1")
    assert uploads.done == made.blobs
    assert uploads.unauthorized == 2


async def test_debian_s_registry_takes_pieces(pulling: Pulling) -> None:
    made = image()
    await pulled(pulling, made)
    with running_registry() as real:
        await push(pulling, f"{real.address}/app:v1", chunk=100_000)
        assert all(real.has_blob("app", digest) for digest in made.blobs)
        assert real.manifest("app", "v1")[1] == made.index
