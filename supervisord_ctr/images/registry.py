"""Registry: one repository at the hosts that serve it, mirrors first.

Owns the pull half of the distribution protocol: resolving, fetching manifests, streaming blobs from
an offset, and which host failed why (P1, P18). Stores nothing. Source: OCI distribution specification,
"Pull"; RFC 9110, "Range Requests" and "Retry-After".
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import time
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from supervisord_ctr.errors import (
    Error,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from supervisord_ctr.images.auth import Anonymous, Authorizer, Credentials
from supervisord_ctr.images.hosts import PULL, PUSH, RESOLVE, HostsConfig, RegistryHost
from supervisord_ctr.images.http import HostFailure, Http, read_limited
from supervisord_ctr.images.manifest import ACCEPT, INDEXES, MANIFESTS, MAX_MANIFEST, load
from supervisord_ctr.images.reference import Reference
from supervisord_ctr.model import Descriptor
from supervisord_ctr.names import is_digest

if TYPE_CHECKING:
    import aiohttp

_MAX_WAIT = 30.0
_TRANSIENT = frozenset((408, 429, 500, 502, 503, 504))


class Failures:
    """What every host answered; becomes one error that lists them all."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._seen: dict[str, tuple[int, str]] = {}

    def add(self, host: RegistryHost, status: int, reason: str) -> None:
        """Note the latest failure of a host (status 0: no answer)."""
        self._seen[host.url] = (status, reason)

    def error(self) -> Error:
        """The error: its class by the most telling answer, its text with every host and reason."""
        if not self._seen:
            return NotFound(f"{self._what}: no host is configured to serve it", kind="image", key=self._what)
        text = f"{self._what}: " + "; ".join(f"{url}: {reason}" for url, (_, reason) in self._seen.items())
        statuses = [status for status, _ in self._seen.values()]
        # The last host is the authority; a mirror's "not found" must not hide that it was not reached.
        last = statuses[-1]
        cls: type[Error] = Unavailable
        if last == 404:
            cls = NotFound
        elif last == 401:
            cls = Unauthenticated
        elif last == 403:
            cls = PermissionDenied
        elif last == 429:
            cls = ResourceExhausted
        return cls(text, kind="image", key=self._what)


class Registry:
    """The repository of `reference`. One object for one pull or push: it remembers its hosts, and the bad ones."""

    def __init__(
        self, reference: Reference, hosts: HostsConfig, http: Http, credentials: Credentials | None = None, *,
        headers: Mapping[str, str] | None = None, retries: int = 5,
    ) -> None:
        self.reference = reference
        self.http = http
        self._hosts = hosts
        self._extra = dict(headers or {})
        self._authorizer = Authorizer(credentials or Anonymous(), http)
        self._retries = max(1, retries)
        self._bad: dict[str, str] = {}
        self._found: dict[str, list[RegistryHost]] = {}

    def hosts(self, capability: str) -> list[RegistryHost]:
        """The hosts to try, those that failed lastingly in this pull left out (unless all did)."""
        found = self._found.get(capability)
        if found is None:
            found = self._found[capability] = self._hosts.lookup(self.reference.domain, capability)
        good = [host for host in found if host.url not in self._bad]
        return good or found

    def failures(self, what: str) -> Failures:
        """An empty list of failures, with the hosts already known to be bad."""
        failures = Failures(what)
        for url, reason in self._bad.items():
            failures.add(RegistryHost(url), 0, reason)
        return failures

    # Requests.

    @contextlib.asynccontextmanager
    async def call(
        self, host: RegistryHost, method: str, path: str, *, scope: str = "", headers: Mapping[str, str] | None = None,
        data: Any = None, params: list[tuple[str, str]] | None = None, url: str = "", redirects: bool = True,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One authorised request to the repository at `host`: `path` is relative to it, `url` is absolute instead.

        HostFailure when there is no answer; any status is given back but a 401 that a token could cure.
        `data` that can be sent once only is made by a function, called for each attempt.
        """
        scope = scope or f"repository:{self.reference.path}:pull"
        for attempt in range(4):
            target = url or f"{self.http.url(host)}{host.path}/{self.reference.path}/{path}"
            query = list(params or [])
            if host.is_mirror and not url:
                query.append(("ns", self.reference.domain))
            sent = {key: ", ".join(values) for key, values in host.headers.items()}
            sent.update(self._extra)
            sent.update(headers or {})
            authorization = await self._authorizer.header(host.host, scope)
            if authorization:
                sent["Authorization"] = authorization
            async with contextlib.AsyncExitStack() as stack:
                try:
                    response = await stack.enter_async_context(self.http.request(
                        method, target, host=host, headers=sent, data=data() if callable(data) else data,
                        params=query or None, redirects=redirects,
                    ))
                except HostFailure as failure:
                    if not failure.lasting and self.http.other_scheme(host):
                        continue
                    raise
                if response.status == 400 and await self._wrong_scheme(host, response):
                    continue
                self.http.scheme_works(host)
                if response.status == 401 and attempt < 3 and await self._authorizer.challenged(
                    host.host, scope, response.headers.getall("WWW-Authenticate", []), authorization
                ):
                    continue
                yield response
                return
        raise HostFailure("401 unauthorized")

    async def _wrong_scheme(self, host: RegistryHost, response: aiohttp.ClientResponse) -> bool:
        """Whether a 400 is that of a TLS server that was spoken to in the clear; the other scheme is set then."""
        if not host.scheme_unsure or response.url.scheme != "http":
            return False
        return "https" in (await read_limited(response, 1 << 16, self.http.timeouts)).decode("latin-1").lower() and (
            self.http.other_scheme(host)
        )

    async def describe(self, response: aiohttp.ClientResponse) -> str:
        """Status and error document of an answer, in one line."""
        text = f"{response.status} {(response.reason or '').lower()}".strip()
        try:
            body = await read_limited(response, 64 << 10, self.http.timeouts)
            errors = load(body, "").get("errors")
            if isinstance(errors, list):
                known = [e for e in errors[:3] if isinstance(e, dict)]
                told = [f"{e.get('code', '')} {e.get('message', '')}".strip() for e in known]
                text += f" ({', '.join(told)[:300]})"
        except (Error, HostFailure, json.JSONDecodeError):
            pass
        return "".join(c if c.isprintable() else " " for c in text)

    def note_failure(self, host: RegistryHost, failures: Failures, failure: HostFailure) -> None:
        """Remember a failure; a lasting one keeps the host out of the rest of this pull."""
        failures.add(host, 0, failure.reason)
        if failure.lasting:
            self._bad[host.url] = failure.reason

    # Manifests.

    async def resolve(self) -> tuple[Descriptor, bytes]:
        """The descriptor of the reference with its document; the first host that has it answers.

        The error lists every host. InvalidArgument when a host's answer contradicts itself.
        """
        reference = self.reference
        failures = self.failures(f"image {reference.canonical()}")
        for host in self.hosts(RESOLVE if not reference.digest else PULL):
            found = await self._manifest(host, reference.object, reference.digest, failures)
            if found is not None:
                return found
        raise failures.error()

    async def fetch_manifest(self, descriptor: Descriptor) -> bytes:
        """The document of `descriptor`, verified; errors as `resolve`."""
        failures = self.failures(f"manifest {descriptor.digest} of {self.reference.name}")
        for host in self.hosts(PULL):
            found = await self._manifest(host, descriptor.digest, descriptor.digest, failures, descriptor.media_type)
            if found is not None:
                return found[1]
        raise failures.error()

    async def _manifest(
        self, host: RegistryHost, name: str, digest: str, failures: Failures, media_type: str = ""
    ) -> tuple[Descriptor, bytes] | None:
        accept = f"{media_type}, */*" if media_type else ACCEPT
        for attempt in range(self._retries):
            try:
                async with self.call(host, "GET", f"manifests/{name}", headers={"Accept": accept}) as response:
                    if response.status == 200:
                        body = await read_limited(response, MAX_MANIFEST, self.http.timeouts)
                        return self._checked(host, response, body, digest, media_type)
                    reason = await self.describe(response)
                    failures.add(host, response.status, reason)
                    if response.status not in _TRANSIENT:
                        return None
                    wait = retry_delay(attempt, response.headers.get("Retry-After"))
            except HostFailure as failure:
                self.note_failure(host, failures, failure)
                if failure.lasting:
                    return None
                wait = retry_delay(attempt)
            except (Unauthenticated, Unavailable) as error:
                failures.add(host, 401 if isinstance(error, Unauthenticated) else 0, error.message)
                return None
            if attempt + 1 < min(self._retries, 3):
                await asyncio.sleep(wait)
            else:
                return None
        return None

    def _checked(
        self, host: RegistryHost, response: aiohttp.ClientResponse, body: bytes, digest: str, media_type: str
    ) -> tuple[Descriptor, bytes]:
        """Digest and media type of an answer compared with what was asked and what the body says (S15)."""
        where = f"manifest {digest or self.reference.object} from {host.url}"
        told = response.headers.get("Docker-Content-Digest", "")
        expected = digest or (told if is_digest(told) else "")
        actual = digest_of(body, expected.partition(":")[0] or "sha256")
        if expected and actual != expected:
            raise InvalidArgument(f"{where}: its digest is {actual}, expected {expected}", kind="manifest", key=actual)
        served = response.headers.get("Content-Type", "").partition(";")[0].strip()
        document = load(body, where)
        if served not in MANIFESTS | INDEXES:
            stated = document.get("mediaType")
            if "manifest.v1" in served or document.get("schemaVersion") == 1:
                raise InvalidArgument(
                    f"{where}: schema 1 image manifests are no longer supported", kind="manifest", key=actual
                )
            if served not in ("", "application/json", "text/plain", "application/octet-stream"):
                raise InvalidArgument(f"{where}: media type {served!r} is not an image's", kind="manifest", key=actual)
            served = media_type or (stated if isinstance(stated, str) else "")
        return Descriptor(served, actual, len(body)), body

    # Blobs.

    @contextlib.asynccontextmanager
    async def open_blob(
        self, host: RegistryHost, descriptor: Descriptor, offset: int
    ) -> AsyncIterator[tuple[int, aiohttp.ClientResponse]]:
        """A blob's bytes from `host`: yields where they start and the response.

        The start is `offset` only when the answer proves it (206 with a fitting Content-Range); a server
        that ignores Range starts at 0 (P2). BlobRefused for another status, HostFailure without an answer.
        """
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        async with self.call(host, "GET", f"blobs/{descriptor.digest}", headers=headers) as response:
            if response.status == 200:
                yield 0, response
            elif response.status == 206 and offset:
                start, total = parse_content_range(response.headers.get("Content-Range", ""))
                if start != offset or (total is not None and total != descriptor.size):
                    raise HostFailure(
                        f"answers a range from {offset} with {response.headers.get('Content-Range', 'none')!r}"
                    )
                yield offset, response
            else:
                raise BlobRefused(
                    response.status, await self.describe(response), response.headers.get("Retry-After")
                )

    async def has_blob(self, host: RegistryHost, descriptor: Descriptor) -> bool:
        """Whether the repository at `host` has the blob (HEAD)."""
        async with self.call(
            host, "HEAD", f"blobs/{descriptor.digest}", scope=f"repository:{self.reference.path}:pull,push"
        ) as response:
            return response.status == 200

    def push_hosts(self) -> list[RegistryHost]:
        """The hosts that may be pushed to."""
        return self.hosts(PUSH)

    @property
    def retries(self) -> int:
        """How often one blob is tried at one host."""
        return self._retries


class BlobRefused(Exception):
    """A host answered a blob request with an error status."""

    def __init__(self, status: int, reason: str, retry_after: str | None) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.retry_after = retry_after

    @property
    def transient(self) -> bool:
        """Whether another try may help."""
        return self.status in _TRANSIENT


def digest_of(data: bytes, algorithm: str = "sha256") -> str:
    """The digest of `data`."""
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def parse_content_range(text: str) -> tuple[int, int | None]:
    """Start and total of `bytes START-END/TOTAL`; start -1 for anything else, total None for `*`."""
    unit, _, rest = text.strip().partition(" ")
    span, _, total = rest.partition("/")
    start, _, _ = span.partition("-")
    if unit != "bytes" or not start.isdigit() or len(start) > 20:
        return -1, None
    return int(start), int(total) if total.isdigit() and len(total) <= 20 else None


def retry_delay(attempt: int, retry_after: str | None = None) -> float:
    """Seconds to wait before the next try: what the server asks for (up to a limit), else exponential with jitter."""
    if retry_after:
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            if retry_after.strip().isdigit():
                return min(float(retry_after), _MAX_WAIT)
            import email.utils

            moment = email.utils.parsedate_to_datetime(retry_after).timestamp()
            return min(max(moment - time.time(), 0.0), _MAX_WAIT)
    return float(min(0.2 * 2**attempt, 10.0) * random.uniform(0.5, 1.0))
