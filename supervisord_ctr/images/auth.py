"""Authentication at registries: credentials, challenges, tokens.

Owns what is sent to prove who asks, and to whom (S15): a credential belongs to one host, is given to
that host or to the token server that host itself names, and never follows a redirect. Tokens are
kept for their lifetime and reused by every pull with the same credentials.

Source: RFC 9110, "Authentication"; Docker registry token specification (Basic GET and OAuth2 POST).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from supervisord_ctr.errors import InvalidArgument, Unauthenticated

_PARAMETER = re.compile(r'\s*,?\s*([A-Za-z_]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^",\s]+))')
_SCHEME = re.compile(r"\s*,?\s*([A-Za-z]+)(?=\s|\Z)")
_MAX_TOKEN = 1 << 20
_CLIENT = "supervisord-ctr"


@dataclass(frozen=True, slots=True)
class Credential:
    """Proof for one host: a user and secret, an identity token (no user), or a whole header."""

    username: str = ""
    secret: str = ""
    header: str = ""

    def __bool__(self) -> bool:
        return bool(self.username or self.secret or self.header)

    def __repr__(self) -> str:
        return f"Credential({self.username!r}, secret not shown)"


NONE = Credential()


class Credentials(Protocol):
    """Where credentials come from; asked once for each host that challenges."""

    async def get(self, host: str) -> Credential:
        """The credential for `host` (with port); an empty one when there is none."""
        ...


@dataclass(frozen=True)
class Anonymous:
    """No credentials at all."""

    async def get(self, host: str) -> Credential:
        return NONE


@dataclass(frozen=True)
class Static:
    """One credential, for the hosts named only."""

    hosts: frozenset[str]
    credential: Credential

    async def get(self, host: str) -> Credential:
        return self.credential if host in self.hosts else NONE


#: Other names of Docker Hub in configuration files.
_HUB = ("https://index.docker.io/v1/", "index.docker.io", "docker.io", "registry-1.docker.io")


@dataclass(frozen=True)
class DockerConfig:
    """Credentials from Docker's `config.json` (auths, credHelpers, credsStore)."""

    path: Path

    async def get(self, host: str) -> Credential:
        """What the file says of `host`; InvalidArgument for a broken file."""
        data = await asyncio.to_thread(self._read)
        names = _HUB if host in _HUB else (host, f"https://{host}", f"http://{host}", f"https://{host}/v1/")
        helpers = data.get("credHelpers") or {}
        helper = next((helpers[name] for name in names if name in helpers), data.get("credsStore"))
        if isinstance(helper, str) and helper and (found := await _ask_helper(helper, names[0])):
            return found
        auths = data.get("auths") or {}
        for name in names:
            if isinstance(entry := auths.get(name), dict):
                return self._entry(entry)
        return NONE

    def _read(self) -> dict[str, Any]:
        try:
            data = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise InvalidArgument(f"{self.path}: {error}", kind="credentials") from error
        return data if isinstance(data, dict) else {}

    def _entry(self, entry: Mapping[str, object]) -> Credential:
        if token := entry.get("identitytoken"):
            return Credential("", str(token))
        if token := entry.get("registrytoken"):
            return Credential(header=f"Bearer {token}")
        if packed := entry.get("auth"):
            try:
                user, colon, secret = base64.b64decode(str(packed), validate=True).decode().partition(":")
            except (binascii.Error, UnicodeDecodeError):
                colon = user = secret = ""
            if not colon:
                raise InvalidArgument(f"{self.path}: auth is not base64 of USER:SECRET", kind="credentials")
            return Credential(user, secret.rstrip("\0"))
        return Credential(str(entry.get("username") or ""), str(entry.get("password") or ""))


async def _ask_helper(helper: str, server: str) -> Credential:
    """Run `docker-credential-HELPER get`, which reads the server's name and answers JSON."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", helper):
        raise InvalidArgument(f"credential helper {helper!r} is not a program's name", kind="credentials")
    try:
        process = await asyncio.create_subprocess_exec(
            f"docker-credential-{helper}", "get", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except FileNotFoundError:
        return NONE
    output, _ = await process.communicate(server.encode())
    try:
        data = json.loads(output)
        user, secret = str(data["Username"]), str(data["Secret"])
    except (ValueError, KeyError, TypeError):
        return NONE
    return Credential("", secret) if user == "<token>" else Credential(user, secret)


@dataclass(frozen=True, slots=True)
class Challenge:
    """One scheme of a WWW-Authenticate header, its parameters in lower-case names."""

    scheme: str
    parameters: Mapping[str, str] = field(default_factory=dict)


def parse_challenges(headers: list[str]) -> list[Challenge]:
    """The challenges of WWW-Authenticate headers, Bearer before Basic; what cannot be read is left out."""
    found: list[Challenge] = []
    for text in headers:
        position = 0
        while match := _SCHEME.match(text, position):
            scheme, position = match[1].lower(), match.end()
            parameters: dict[str, str] = {}
            while parameter := _PARAMETER.match(text, position):
                value = parameter[2] if parameter[2] is not None else parameter[3]
                parameters[parameter[1].lower()] = re.sub(r"\\(.)", r"\1", value)
                position = parameter.end()
            found.append(Challenge(scheme, parameters))
    order = {"bearer": 0, "basic": 1}
    return sorted((c for c in found if c.scheme in order), key=lambda c: order[c.scheme])


class TokenClient(Protocol):
    """The HTTP calls that fetching a token needs; never follows a redirect with credentials."""

    async def token_request(
        self, method: str, url: str, *, params: list[tuple[str, str]], form: Mapping[str, str] | None,
        authorization: str,
    ) -> tuple[int, bytes]: ...


@dataclass(slots=True)
class _Token:
    value: str
    expires: float


class Authorizer:
    """Answers challenges for the hosts of one pull or push, with one source of credentials."""

    def __init__(self, credentials: Credentials, client: TokenClient) -> None:
        self._credentials = credentials
        self._client = client
        self._headers: dict[tuple[str, str], _Token] = {}
        self._realms: dict[str, Challenge] = {}
        self._known: dict[str, Credential] = {}
        self._lock = asyncio.Lock()

    async def header(self, host: str, scope: str) -> str:
        """The Authorization header to send to `host` now, "" while it has not challenged."""
        challenge = self._realms.get(host)
        if challenge is None:
            return ""
        if challenge.scheme == "basic":
            return _basic(self._known.get(host, NONE))
        async with self._lock:
            found = self._headers.get((host, scope))
            if found is None or found.expires < time.monotonic():
                if self._known.get(host, NONE).header:
                    return self._known[host].header
                found = self._headers[(host, scope)] = await self._fetch(host, challenge, scope)
            return f"Bearer {found.value}"

    async def challenged(self, host: str, scope: str, headers: list[str], sent: str) -> bool:
        """Take in a 401's challenges; whether another try with what `header` then gives makes sense."""
        challenges = parse_challenges(headers)
        if not challenges:
            return False
        chosen = challenges[0]
        if host not in self._known:
            self._known[host] = await self._credentials.get(host)
        if chosen.scheme == "basic" and (sent or not self._known[host]):
            return False
        self._headers.pop((host, scope), None)
        self._realms[host] = chosen
        return True

    async def _fetch(self, host: str, challenge: Challenge, scope: str) -> _Token:
        realm = challenge.parameters.get("realm", "")
        parts = urlsplit(realm)
        credential = self._known.get(host, NONE)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise Unauthenticated(
                f"registry {host}: its token server {realm[:200]!r} is not a URL", kind="registry", key=host
            )
        if parts.scheme == "http" and credential and parts.hostname != urlsplit(f"//{host}").hostname:
            raise Unauthenticated(
                f"registry {host}: refusing to send credentials in the clear to its token server {realm}",
                kind="registry", key=host,
            )
        scopes = sorted({*scope.split(), *challenge.parameters.get("scope", "").split()})
        service = challenge.parameters.get("service", "")
        status, body = await self._ask(realm, service, scopes, credential)
        if status != 200:
            detail = body[:200].decode("utf-8", "replace").strip()
            raise Unauthenticated(
                f"registry {host}: token server {realm} answered {status}: {detail}", kind="registry", key=host
            )
        return _parse_token(body, host)

    async def _ask(self, realm: str, service: str, scopes: list[str], credential: Credential) -> tuple[int, bytes]:
        base = [("service", service)] if service else []
        if credential.secret and not credential.username:
            form = {
                "grant_type": "refresh_token", "refresh_token": credential.secret, "client_id": _CLIENT,
                "service": service, "scope": " ".join(scopes),
            }
            return await self._client.token_request("POST", realm, params=[], form=form, authorization="")
        params = base + [("scope", scope) for scope in scopes]
        if credential.username:
            params.insert(0, ("account", credential.username))
        status, body = await self._client.token_request(
            "GET", realm, params=params, form=None, authorization=_basic(credential)
        )
        if status in (404, 405) and credential.username:
            form = {
                "grant_type": "password", "username": credential.username, "password": credential.secret,
                "client_id": _CLIENT, "service": service, "scope": " ".join(scopes),
            }
            return await self._client.token_request("POST", realm, params=[], form=form, authorization="")
        return status, body


def _basic(credential: Credential) -> str:
    if credential.header:
        return credential.header
    if not credential.username:
        return ""
    return "Basic " + base64.b64encode(f"{credential.username}:{credential.secret}".encode()).decode()


def _parse_token(body: bytes, host: str) -> _Token:
    try:
        data = json.loads(body[:_MAX_TOKEN])
        value = data.get("token") or data.get("access_token")
        lifetime = float(data.get("expires_in") or 60)
    except (ValueError, AttributeError, TypeError):
        value = None
        lifetime = 0.0
    if not isinstance(value, str) or not value or any(c in value for c in "\r\n\0 "):
        raise Unauthenticated(f"registry {host}: its token server sent no token", kind="registry", key=host)
    return _Token(value, time.monotonic() + max(lifetime - 10.0, 5.0))
