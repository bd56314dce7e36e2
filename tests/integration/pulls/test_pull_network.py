"""Pulls over a network that asks for credentials, drops, stalls and lies (P1, P2, P18, S15)."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from supervisord_ctr.errors import (
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from supervisord_ctr.images.auth import Credential, Static
from supervisord_ctr.images.config import read_config
from supervisord_ctr.images.http import Timeouts
from supervisord_ctr.images.leases import leftover_id
from supervisord_ctr.images.progress import COMPLETE
from tests.support.daemon import wait_until
from tests.support.fake_registry import (
    FakeRegistry,
    Handler,
    Rule,
    Seen,
    ask_basic,
    drop_once,
    fake_registry,
    ignore_ranges,
    refuse,
)
from tests.support.images import (
    build,
    file,
    layer,
    small_image,
)
from tests.support.pulling import NAMESPACE, Pulling, open_pulling, refused


def begin(handler: Handler, length: int) -> None:
    """The head of an answer whose body the test sends as it likes."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(length))
    handler.end_headers()


# Credentials.

async def test_basic_authentication(pulling: Pulling, registry: FakeRegistry) -> None:
    name = registry.add("app", "v1", small_image())
    registry.rules.append(ask_basic("user", "secret"))
    await refused(pulling, name, Unauthenticated, "401")
    login = Static(frozenset({registry.address}), Credential("user", "wrong"))
    await refused(pulling, name, Unauthenticated, "401", credentials=login)
    await pulling.pull(name, credentials=Static(frozenset({registry.address}), Credential("user", "secret")))


def token_rule(registry: FakeRegistry, tokens: list[dict[str, Any]]) -> Rule:
    """Bearer tokens, handed out by the same server at /token to "user"; what was asked for is noted."""

    def rule(handler: Handler, seen: Seen) -> bool:
        if seen.path == "/token":
            tokens.append({"query": seen.query, "authorization": seen.headers.get("authorization", ""),
                           "method": seen.method, "body": seen.body})
            handler.answer(200, json.dumps({"token": "abc", "expires_in": 300}).encode())
            return True
        if seen.headers.get("authorization") == "Bearer abc":
            return False
        challenge = f'Bearer realm="http://{registry.address}/token",service="svc",scope="repository:app:pull"'
        handler.answer(401, b"{}", {"WWW-Authenticate": challenge})
        return True

    return rule


async def test_bearer_tokens_are_fetched_once(pulling: Pulling, registry: FakeRegistry) -> None:
    tokens: list[dict[str, Any]] = []
    registry.rules.append(token_rule(registry, tokens))
    name = registry.add("app", "v1", small_image())
    await pulling.pull(name, credentials=Static(frozenset({registry.address}), Credential("user", "secret")))
    assert len(tokens) == 1
    assert tokens[0]["query"] == {"account": ["user"], "service": ["svc"], "scope": ["repository:app:pull"]}
    assert tokens[0]["authorization"].startswith("Basic ")


async def test_identity_tokens_are_posted(pulling: Pulling, registry: FakeRegistry) -> None:
    tokens: list[dict[str, Any]] = []
    registry.rules.append(token_rule(registry, tokens))
    name = registry.add("app", "v1", small_image())
    await pulling.pull(name, credentials=Static(frozenset({registry.address}), Credential("", "identity")))
    assert tokens[0]["method"] == "POST"
    assert b"refresh_token=identity" in tokens[0]["body"]
    assert b"grant_type=refresh_token" in tokens[0]["body"]


async def test_s15_credentials_do_not_follow_a_redirect(pulling: Pulling, registry: FakeRegistry) -> None:
    made = small_image()
    name = registry.add("app", "v1", made)
    with fake_registry() as storage:
        storage.blobs.update(made.blobs)

        def elsewhere(handler: Handler, seen: Seen) -> bool:
            if "/blobs/" not in seen.path or seen.headers.get("authorization") is None:
                return False
            handler.answer(307, b"", {"Location": f"http://{storage.address}{seen.path}?signature=x"})
            return True

        registry.rules += [ask_basic("user", "secret"), elsewhere]
        await pulling.pull(name, credentials=Static(frozenset({registry.address}), Credential("user", "secret")))
        asked = storage.requests("/blobs/")
        assert len(asked) == 3
        assert all("authorization" not in seen.headers for seen in asked)


async def test_s15_another_host_gets_no_credentials(tmp_path: Path, registry: FakeRegistry) -> None:
    made = small_image()
    registry.add("app", "v1", made)
    with fake_registry() as mirror:
        mirror.add("app", "v1", made)
        mirror.rules.append(ask_basic("user", "secret"))
        hosts = tmp_path / "hosts" / registry.address
        hosts.mkdir(parents=True)
        (hosts / "hosts.toml").write_text(f'[host."http://{mirror.address}"]\ncapabilities = ["pull", "resolve"]\n')
        async with open_pulling(tmp_path / "s", config_path=str(tmp_path / "hosts")) as pulling:
            login = Static(frozenset({registry.address}), Credential("user", "secret"))
            await pulling.pull(f"{registry.address}/app:v1", credentials=login)
        assert mirror.seen
        assert all("authorization" not in seen.headers for seen in mirror.seen)


# Lines that drop, hosts that fail (P1, P2, P18).

async def test_p2_a_dropped_connection_is_resumed(pulling: Pulling, registry: FakeRegistry) -> None:
    made = build([layer(file("data", os.urandom(3 << 20)))])
    registry.rules.append(drop_once(made.layers[0], 1 << 20))
    await pulling.pull(registry.add("app", "v1", made))
    asked = registry.requests(made.layers[0])
    assert [seen.headers.get("range") for seen in asked] == [None, f"bytes={1 << 20}-"]


async def test_p2_a_server_that_ignores_ranges(pulling: Pulling, registry: FakeRegistry) -> None:
    made = build([layer(file("data", os.urandom(2 << 20)))])
    registry.rules += [drop_once(made.layers[0], 1 << 20), ignore_ranges]
    image = await pulling.pull(registry.add("app", "v1", made))
    config = await read_config(pulling.database, NAMESPACE, image)
    assert (await pulling.left())["snapshots"] == config.chain_ids()


@pytest.mark.parametrize("told", ["bytes 5-9/10", "bytes 0-1/*", "nonsense", ""])
async def test_p2_a_range_that_is_another_one_is_not_believed(
    pulling: Pulling, registry: FakeRegistry, told: str
) -> None:
    made = build([layer(file("data", os.urandom(1 << 20)))])
    lies = iter([True])

    def lie(handler: Handler, seen: Seen) -> bool:
        if "range" not in seen.headers or not next(lies, False):
            return False
        handler.answer(206, b"rubbish", {"Content-Range": told} if told else {})
        return True

    registry.rules += [drop_once(made.layers[0], 1 << 19), lie]
    await pulling.pull(registry.add("app", "v1", made))


async def test_p2_what_arrived_survives_a_failed_pull(pulling: Pulling, registry: FakeRegistry) -> None:
    made = build([layer(file("data", os.urandom(2 << 20)))])
    digest = made.layers[0]
    broken = threading.Event()

    def fail(handler: Handler, seen: Seen) -> bool:
        if broken.is_set() or not seen.path.endswith(digest):
            return False
        if "range" not in seen.headers:
            handler.answer_part(registry.blobs[digest], 1 << 20)
        else:
            handler.answer(500, b"{}")
        return True

    registry.rules.append(fail)
    name = registry.add("app", "v1", made)
    with pytest.raises(Unavailable, match="500"):
        await pulling.pull(name)
    assert (await pulling.left())["images"] == []
    broken.set()
    before = len(registry.requests(digest))
    await pulling.pull(name)
    assert [seen.headers.get("range") for seen in registry.requests(digest)[before:]] == [f"bytes={1 << 20}-"]


async def test_p2_blobs_that_arrived_whole_survive_a_failed_pull(pulling: Pulling, registry: FakeRegistry) -> None:
    made = build([layer(file("base", os.urandom(1000))), layer(file("top", os.urandom(1000)))])
    whole, broken = made.layers

    def arrived() -> bool:
        return any(at.event == COMPLETE and at.descriptor and at.descriptor.digest == whole for at in pulling.progress)

    def hold(handler: Handler, seen: Seen) -> bool:
        if seen.path.endswith(broken):
            wait_until(arrived, "the other layer has arrived")
        return False

    registry.rules += [hold, refuse(broken)]
    name = registry.add("app", "v1", made)
    with pytest.raises(Unavailable, match="500"):
        await pulling.pull(name)
    await pulling.database.gc.collect()
    left = await pulling.left()
    assert (left["images"], left["snapshots"]) == ([], [])
    assert left["leases"] == [leftover_id(name)]
    assert {info.digest for info in await pulling.database.content.walk(NAMESPACE)} >= {whole, made.target}
    registry.rules.clear()
    before = len(registry.requests(whole))
    await pulling.pull(name)
    assert len(registry.requests(whole)) == before, "a layer that was here was fetched again"
    assert (await pulling.left())["leases"] == [], "what protected the rest of the failed pull stays"


async def test_p5_an_image_that_is_refused_later_leaves_nothing(pulling: Pulling, registry: FakeRegistry) -> None:
    made = build([layer(file("base", os.urandom(1000))), layer(file("top", os.urandom(1000)))])
    name = registry.add("app", "v1", made)
    registry.rules.append(refuse(made.layers[1]))
    with pytest.raises(Unavailable):
        await pulling.pull(name)
    registry.rules.clear()
    registry.blobs[made.layers[1]] = registry.blobs[made.layers[1]][::-1]
    await refused(pulling, name, FailedPrecondition, "unexpected digest")


async def test_p2_retry_after_is_honoured(pulling: Pulling, registry: FakeRegistry) -> None:
    made = small_image()
    busy = iter([True])

    def throttle(handler: Handler, seen: Seen) -> bool:
        if not seen.path.endswith(made.layers[0]) or not next(busy, False):
            return False
        handler.answer(429, b"{}", {"Retry-After": "0"})
        return True

    registry.rules.append(throttle)
    await pulling.pull(registry.add("app", "v1", made))
    assert len(registry.requests(made.layers[0])) == 2


async def test_p2_a_full_disk_is_told(pulling: Pulling, registry: FakeRegistry) -> None:
    from supervisord_ctr import faults

    made = small_image()
    name = registry.add("app", "v1", made)
    faults.arm("pull.completed=error:ENOSPC")
    try:
        with pytest.raises((ResourceExhausted, OSError)):
            await pulling.pull(name)
    finally:
        faults.arm("")
    await pulling.pull(name)
    assert len(registry.requests(made.layers[0])) == 1


async def test_p1_a_stalled_registry_is_given_up(tmp_path: Path, registry: FakeRegistry) -> None:
    made = build([layer(file("data", os.urandom(1 << 20)))])

    def stall(handler: Handler, seen: Seen) -> bool:
        if not seen.path.endswith(made.layers[0]):
            return False
        body = registry.blobs[made.layers[0]]
        begin(handler, len(body))
        handler.wfile.write(body[:1000])
        handler.wfile.flush()
        registry.stopped.wait(60)
        return True

    registry.rules.append(stall)
    name = registry.add("app", "v1", made)
    async with open_pulling(tmp_path / "s", timeouts=Timeouts(stall=0.3, header=0.5), retries=1) as pulling:
        with pytest.raises(Unavailable, match=r"sent nothing for 0\.3 s"):
            await pulling.pull(name)


async def test_p1_a_trickle_counts_as_a_stall(tmp_path: Path, registry: FakeRegistry) -> None:
    made = build([layer(file("data", os.urandom(1 << 20)))])

    def trickle(handler: Handler, seen: Seen) -> bool:
        if not seen.path.endswith(made.layers[0]):
            return False
        body = registry.blobs[made.layers[0]]
        begin(handler, len(body))
        for byte in body:
            handler.wfile.write(bytes((byte,)))
            handler.wfile.flush()
            if registry.stopped.wait(0.05):
                break
        return True

    registry.rules.append(trickle)
    name = registry.add("app", "v1", made)
    patience = Timeouts(rate=10_000, rate_window=0.3)
    async with open_pulling(tmp_path / "s", timeouts=patience, retries=1) as pulling:
        with pytest.raises(Unavailable, match="less than 10000 bytes a second"):
            await pulling.pull(name)


async def test_p1_a_header_that_never_comes(tmp_path: Path, registry: FakeRegistry) -> None:
    def silent(handler: Handler, seen: Seen) -> bool:
        registry.stopped.wait(60)
        return True

    registry.rules.append(silent)
    patience = Timeouts(connect=0.2, header=0.3)
    async with open_pulling(tmp_path / "s", timeouts=patience, retries=1) as pulling:
        with pytest.raises(Unavailable, match=r"no answer within 0\.3 s"):
            await pulling.pull(f"{registry.address}/app:v1")


async def test_p18_mirrors_are_tried_in_order_and_errors_name_them(tmp_path: Path, registry: FakeRegistry) -> None:
    made = small_image()
    registry.add("app", "v1", made)
    with fake_registry() as empty:
        hosts = tmp_path / "hosts" / "example.test"
        hosts.mkdir(parents=True)
        (hosts / "hosts.toml").write_text(
            f'server = "http://{registry.address}"\n'
            f'[host."http://127.0.0.1:1"]\n[host."http://{empty.address}"]\n'
        )
        async with open_pulling(tmp_path / "s", config_path=str(tmp_path / "hosts")) as pulling:
            await pulling.pull("example.test/app:v1")
            assert empty.seen[0].query == {"ns": ["example.test"]}
            with pytest.raises(NotFound) as caught:
                await pulling.pull("example.test/no-such:v1")
            for text in ("http://127.0.0.1:1: ", f"http://{empty.address}: 404", f"http://{registry.address}: 404"):
                assert text in caught.value.message


async def test_p18_no_fallback(tmp_path: Path, registry: FakeRegistry) -> None:
    hosts = tmp_path / "hosts" / registry.address
    hosts.mkdir(parents=True)
    registry.add("app", "v1", small_image())
    (hosts / "hosts.toml").write_text('fallback = false\n[host."http://127.0.0.1:1"]\n')
    async with open_pulling(tmp_path / "s", config_path=str(tmp_path / "hosts")) as pulling:
        with pytest.raises(Unavailable):
            await pulling.pull(f"{registry.address}/app:v1")
    assert registry.seen == []


async def test_a_pull_that_nobody_waits_for_ends(pulling: Pulling, registry: FakeRegistry) -> None:
    made = build([layer(file("data", os.urandom(1 << 20)))])

    def hold(handler: Handler, seen: Seen) -> bool:
        if not seen.path.endswith(made.layers[0]):
            return False
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(registry.blobs[made.layers[0]])))
        handler.end_headers()
        handler.wfile.write(registry.blobs[made.layers[0]][:5000])
        handler.wfile.flush()
        registry.stopped.wait(60)
        return True

    registry.rules.append(hold)
    name = registry.add("app", "v1", made)
    pull = asyncio.ensure_future(pulling.pull(name))
    while not registry.requests(made.layers[0]):
        await asyncio.sleep(0.01)
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull
    kept = {"images": [], "snapshots": [], "leases": [leftover_id(name)]}
    while await pulling.left() != kept:
        await asyncio.sleep(0.01)
    assert pulling.puller.running() == []
