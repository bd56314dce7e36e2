"""HTTP: the connections to registries, kept and shared by every pull and push.

Owns the `aiohttp` sessions (loaded at the first request: importing them costs 0.4 s and 20 MiB),
redirects by hand so that credentials stay with their host (S15), and the limits on waiting (P1).
Knows no registries.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from supervisord_ctr.errors import InvalidArgument, Unavailable
from supervisord_ctr.images.hosts import RegistryHost

if TYPE_CHECKING:
    import aiohttp

_REDIRECTS = 6
_TOKEN_LIMIT = 1 << 20
_BUFFER = 1 << 20


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Longest waits in seconds: for a connection, the first header, the next piece of a body; and the slowest rate.

    A transfer below `rate` bytes a second over `rate_window` seconds counts as stalled.
    """

    connect: float = 10.0
    header: float = 30.0
    stall: float = 30.0
    rate: int = 1024
    rate_window: float = 60.0


class HostFailure(Exception):
    """A host could not be talked to; `lasting` says that trying it again within the pull is pointless."""

    def __init__(self, reason: str, *, lasting: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.lasting = lasting


class Http:
    """Sessions by TLS set-up. Belongs to the event loop; `close` it."""

    def __init__(self, timeouts: Timeouts | None = None, *, user_agent: str = "supervisord-ctr") -> None:
        self.timeouts = timeouts or Timeouts()
        self._agent = user_agent
        self._sessions: dict[tuple[object, ...], aiohttp.ClientSession] = {}
        self._plain: set[str] = set()
        self._tls: set[str] = set()

    async def close(self) -> None:
        """Close every connection."""
        sessions, self._sessions = list(self._sessions.values()), {}
        for session in sessions:
            await session.close()

    def _session(self, host: RegistryHost | None) -> aiohttp.ClientSession:
        import aiohttp

        key = host.tls_key() if host is not None else ((), (), False)
        session = self._sessions.get(key)
        if session is None:
            connector = aiohttp.TCPConnector(
                limit=64, limit_per_host=16, ssl=_context(host) if host is not None else True, ttl_dns_cache=60,
                enable_cleanup_closed=False,
            )
            session = self._sessions[key] = aiohttp.ClientSession(
                connector=connector, auto_decompress=False, read_bufsize=_BUFFER, cookie_jar=aiohttp.DummyCookieJar(),
                headers={"User-Agent": self._agent, "Accept-Encoding": "identity"},
                timeout=aiohttp.ClientTimeout(total=None, sock_read=self.timeouts.stall),
            )
        return session

    def url(self, host: RegistryHost) -> str:
        """Scheme and host to use now: what a loopback registry speaks is remembered."""
        if host.scheme_unsure:
            if host.host in self._tls:
                return f"https://{host.host}"
            if host.host in self._plain:
                return f"http://{host.host}"
        return host.url

    def other_scheme(self, host: RegistryHost) -> bool:
        """After a failure that looks like the wrong scheme: switch to the other; False if both were tried."""
        if not host.scheme_unsure or host.host in self._tls or host.host in self._plain:
            return False
        (self._tls if host.url.startswith("http:") else self._plain).add(host.host)
        return True

    def scheme_works(self, host: RegistryHost) -> None:
        """The scheme in use got an answer: keep to it."""
        if host.scheme_unsure and host.host not in self._tls:
            (self._plain if host.url.startswith("http:") else self._tls).add(host.host)

    @contextlib.asynccontextmanager
    async def request(
        self, method: str, url: str, *, host: RegistryHost | None = None, headers: Mapping[str, str] | None = None,
        data: Any = None, params: list[tuple[str, str]] | None = None, redirects: bool = True,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One request with its redirects followed; HostFailure when no answer came.

        `headers` with secrets (Authorization and those of `host`) are sent to the first origin only.
        """
        origin = _origin(url)
        current = dict(headers or {})
        for _ in range(_REDIRECTS):
            response = await self._send(method, url, host, current, data, params)
            location = response.headers.get("Location", "")
            if not redirects or response.status not in (301, 302, 303, 307, 308) or not location:
                try:
                    yield response
                finally:
                    response.close() if not response.content.at_eof() else response.release()
                return
            response.close()
            target = urljoin(url, location)
            if urlsplit(target).scheme not in ("http", "https"):
                raise HostFailure(f"redirects to {target[:200]!r}, which is not HTTP")
            if url.startswith("https:") and target.startswith("http:"):
                raise HostFailure(f"redirects from HTTPS to plain HTTP ({_origin(target)})")
            url, params = target, None
            if _origin(url) != origin:
                current = {key: value for key, value in current.items() if key in ("Range", "Accept", "If-Range")}
                host = None
            if response.status == 303:
                method, data = "GET", None
        raise HostFailure("redirects in a circle")

    async def _send(
        self, method: str, url: str, host: RegistryHost | None, headers: dict[str, str], data: Any,
        params: list[tuple[str, str]] | None,
    ) -> aiohttp.ClientResponse:
        import aiohttp

        connect = host.dial_timeout if host is not None and host.dial_timeout else self.timeouts.connect
        limit = aiohttp.ClientTimeout(total=None, sock_connect=connect, sock_read=self.timeouts.stall)
        session = self._session(host)
        try:
            # An upload may take as long as it makes progress; only then does the wait for the header begin.
            async with asyncio.timeout(None if data is not None else connect + self.timeouts.header):
                return await session.request(
                    method, url, headers=headers, data=data, params=params, allow_redirects=False, timeout=limit,
                    proxy=_proxy(url),
                )
        except TimeoutError as error:
            if isinstance(error, aiohttp.ConnectionTimeoutError):
                raise HostFailure(f"no connection within {connect:g} s", lasting=True) from error
            raise HostFailure(f"no answer within {self.timeouts.header:g} s", lasting=True) from error
        except aiohttp.ClientConnectorCertificateError as error:
            raise HostFailure(f"its certificate is not valid: {error.certificate_error}", lasting=True) from error
        except aiohttp.ClientConnectorSSLError as error:
            raise HostFailure(_reason(error.os_error)) from error
        except aiohttp.ClientConnectorError as error:
            raise HostFailure(_reason(error.os_error), lasting=True) from error
        except (aiohttp.ClientError, ssl.SSLError, OSError, ValueError) as error:
            raise HostFailure(_reason(error)) from error

    async def token_request(
        self, method: str, url: str, *, params: list[tuple[str, str]], form: Mapping[str, str] | None,
        authorization: str,
    ) -> tuple[int, bytes]:
        """The answer of a token server; redirects are not followed. Unavailable when there is none."""
        headers = {"Authorization": authorization} if authorization else {}
        try:
            async with self.request(
                method, url, headers=headers, params=params, data=dict(form) if form else None, redirects=False
            ) as response:
                return response.status, await read_limited(response, _TOKEN_LIMIT, self.timeouts)
        except HostFailure as failure:
            raise Unavailable(f"token server {_origin(url)}: {failure.reason}", kind="registry") from failure


async def read_limited(response: aiohttp.ClientResponse, limit: int, timeouts: Timeouts) -> bytes:
    """The whole body; InvalidArgument beyond `limit` bytes (S8), HostFailure when it breaks off or stalls."""
    import aiohttp

    if (response.content_length or 0) > limit:
        raise InvalidArgument(f"answer of {response.content_length} bytes, at most {limit} are allowed")
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeouts.stall + limit / max(timeouts.rate, 1)):
            async for part in response.content.iter_any():
                size += len(part)
                if size > limit:
                    raise InvalidArgument(f"answer of more than {limit} bytes")
                parts.append(part)
    except TimeoutError as error:
        raise HostFailure("the answer stalled") from error
    except (aiohttp.ClientError, OSError) as error:
        raise HostFailure(_reason(error)) from error
    return b"".join(parts)


def _context(host: RegistryHost) -> ssl.SSLContext | bool:
    """How to speak TLS with `host`; True is the library's own way. Reading the system's authorities takes 0.1 s."""
    if not (host.ca or host.client or host.skip_verify):
        return True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if host.skip_verify else ssl.create_default_context()
    try:
        for file in host.ca:
            context.load_verify_locations(file)
        for certificate, key in host.client:
            context.load_cert_chain(certificate, key or None)
    except (OSError, ssl.SSLError) as error:
        raise InvalidArgument(f"registry {host.url}: cannot load certificates: {error}", kind="registry") from error
    if host.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for `url`."""
    if not any(name.lower().endswith("_proxy") for name in os.environ):
        return None
    import urllib.request

    parts = urlsplit(url)
    proxies = urllib.request.getproxies_environment()
    if not proxies or urllib.request.proxy_bypass(parts.netloc):
        return None
    if parts.hostname in ("localhost", "127.0.0.1", "::1"):
        return None
    return proxies.get(parts.scheme)


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and (error.errno or 0) > 0 and not isinstance(error, ssl.SSLError):
        text = os.strerror(error.errno or 0)
    else:
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text[:1].lower() + text[1:300]
