"""Challenges, credentials from files, and to whom they are shown."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from supervisord_ctr.errors import InvalidArgument, Unauthenticated
from supervisord_ctr.images.auth import Authorizer, Credential, DockerConfig, Static, parse_challenges


class Tokens:
    """A token server."""

    def __init__(self, *answers: tuple[int, bytes]) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, str, list[tuple[str, str]], Mapping[str, str] | None, str]] = []

    async def token_request(
        self, method: str, url: str, *, params: list[tuple[str, str]], form: Mapping[str, str] | None,
        authorization: str,
    ) -> tuple[int, bytes]:
        self.asked.append((method, url, params, form, authorization))
        return self.answers.pop(0)


TOKEN = (200, json.dumps({"token": "t1", "expires_in": 600}).encode())
BEARER = 'Bearer realm="https://auth.test/token",service="s",scope="repository:a:pull"'


def test_challenges_are_read_with_bearer_first() -> None:
    found = parse_challenges(['Basic realm="x", ' + BEARER + ', error="invalid_token"', "Negotiate abc"])
    assert [c.scheme for c in found] == ["bearer", "basic"]
    assert found[0].parameters == {
        "realm": "https://auth.test/token", "service": "s", "scope": "repository:a:pull", "error": "invalid_token"
    }


@pytest.mark.parametrize("header", ["", "Bearer", 'Bearer realm="unterminated', "=,=,", 'Basic realm="a\\"b"', "x" * 9000])
def test_odd_challenges_do_no_harm(header: str) -> None:
    parse_challenges([header])


async def test_a_token_is_reused_until_it_expires() -> None:
    tokens = Tokens(TOKEN, (200, b'{"access_token": "t2"}'))
    authorizer = Authorizer(Static(frozenset({"r.test"}), Credential("u", "p")), tokens)
    assert await authorizer.header("r.test", "repository:a:pull") == ""
    assert await authorizer.challenged("r.test", "repository:a:pull", [BEARER], "")
    assert await authorizer.header("r.test", "repository:a:pull") == "Bearer t1"
    assert await authorizer.header("r.test", "repository:a:pull") == "Bearer t1"
    assert await authorizer.header("r.test", "repository:b:pull") == "Bearer t2"
    assert [asked[2] for asked in tokens.asked] == [
        [("account", "u"), ("service", "s"), ("scope", "repository:a:pull")],
        [("account", "u"), ("service", "s"), ("scope", "repository:a:pull"), ("scope", "repository:b:pull")],
    ]


async def test_a_token_server_without_get() -> None:
    tokens = Tokens((405, b""), TOKEN)
    authorizer = Authorizer(Static(frozenset({"r.test"}), Credential("u", "p")), tokens)
    await authorizer.challenged("r.test", "x", [BEARER], "")
    assert await authorizer.header("r.test", "x") == "Bearer t1"
    assert tokens.asked[1][0] == "POST"
    assert tokens.asked[1][3]["password"] == "p"  # type: ignore[index]


@pytest.mark.parametrize(("realm", "told"), [
    ("http://elsewhere.test/token", "in the clear"), ("file:///etc/passwd", "not a URL"), ("", "not a URL"),
])
async def test_s15_a_realm_that_must_not_see_credentials(realm: str, told: str) -> None:
    tokens = Tokens()
    authorizer = Authorizer(Static(frozenset({"r.test"}), Credential("u", "p")), tokens)
    await authorizer.challenged("r.test", "x", [f'Bearer realm="{realm}"'], "")
    with pytest.raises(Unauthenticated, match=told):
        await authorizer.header("r.test", "x")
    assert tokens.asked == []


@pytest.mark.parametrize("answer", [(403, b"no"), (200, b"[]"), (200, b"{}"), (200, b'{"token": "a\\r\\nb"}')])
async def test_refused_tokens(answer: tuple[int, bytes]) -> None:
    authorizer = Authorizer(Static(frozenset(), Credential()), Tokens(answer))
    await authorizer.challenged("r.test", "x", [BEARER], "")
    with pytest.raises(Unauthenticated):
        await authorizer.header("r.test", "x")


async def test_s15_basic_is_shown_to_its_own_host_only() -> None:
    authorizer = Authorizer(Static(frozenset({"mine.test"}), Credential("u", "p")), Tokens())
    assert not await authorizer.challenged("other.test", "x", ["Basic realm=a"], "")
    assert await authorizer.challenged("mine.test", "x", ["Basic realm=a"], "")
    sent = await authorizer.header("mine.test", "x")
    assert sent == "Basic " + base64.b64encode(b"u:p").decode()
    assert await authorizer.header("other.test", "x") == ""
    assert not await authorizer.challenged("mine.test", "x", ["Basic realm=a"], sent)


async def test_docker_config(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"auths": {
        "quay.io": {"auth": base64.b64encode(b"robot:s:ecret").decode()},
        "https://index.docker.io/v1/": {"username": "me", "password": "pw"},
        "ghcr.io": {"identitytoken": "idt"}, "bad.test": {"auth": "!!!"},
    }}))
    config = DockerConfig(path)
    assert await config.get("quay.io") == Credential("robot", "s:ecret")
    assert await config.get("registry-1.docker.io") == Credential("me", "pw")
    assert await config.get("ghcr.io") == Credential("", "idt")
    assert not await config.get("elsewhere.test")
    with pytest.raises(InvalidArgument):
        await config.get("bad.test")
    assert not await DockerConfig(tmp_path / "none").get("quay.io")


def test_secrets_are_not_printed() -> None:
    assert "secret" not in repr(Credential("user", "topsecret")).replace("secret not shown", "")
