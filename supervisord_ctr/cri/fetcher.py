"""What the CRI room asks of the puller, in the puller's words: credentials, pulls, unpacking, progress.

Owns the limit on a pull without progress, and to which hosts a request's credentials go (S15): to the
server address that the request names, else to the registry of the image's name and the server that
the hosts configuration puts in its place — never to mirrors.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from supervisord_ctr import errors
from supervisord_ctr.images import reference
from supervisord_ctr.images.auth import Credential, Credentials, Static
from supervisord_ctr.model import Image
from supervisord_ctr.names import CRI_NAMESPACE

if TYPE_CHECKING:
    from supervisord_ctr.images.pull import Puller


@dataclass(frozen=True)
class Login:
    """A request's credentials, before it is known for which image."""

    username: str = ""
    password: str = ""
    identity_token: str = ""
    registry_token: str = ""
    server: str = ""

    def credential(self) -> Credential:
        """What is shown to a host."""
        if self.username:
            return Credential(self.username, self.password)
        if self.identity_token:
            return Credential(secret=self.identity_token)
        return Credential(header=f"Bearer {self.registry_token}")


class PullerFetcher:
    """`images.Fetcher` and `image_reader.Unpacker` over `images.pull.Puller`. `stall` is in seconds, 0 for no limit."""

    def __init__(self, puller: Puller, stall: float = 0.0) -> None:
        self._puller = puller
        self._stall = stall

    def login(
        self, *, username: str = "", password: str = "", identity_token: str = "", registry_token: str = "",
        server: str = "",
    ) -> Login:
        """Keep the request's words until the image is known."""
        return Login(username, password, identity_token, registry_token, server)

    def _credentials(self, login: Login | None, domain: str) -> Credentials | None:
        if login is None:
            return None
        if login.server:
            text = login.server if "://" in login.server else f"//{login.server}"
            hosts = {urlsplit(text).netloc}
            if "docker.io" in login.server:
                hosts |= {"docker.io", "registry-1.docker.io"}
        else:
            hosts = {domain, self._puller.hosts.default(domain).host}
            hosts |= {host.host for host in self._puller.hosts.lookup(domain, "pull") if not host.is_mirror}
        return Static(frozenset(hosts), login.credential())

    async def pull(self, name: str, *, snapshotter: str, credentials: Any, labels: dict[str, str]) -> Image:
        """The image, pulled and unpacked; `DeadlineExceeded` when nothing moves for too long."""
        domain = reference.parse(name).domain
        moved = time.monotonic()

        def progress(_: object) -> None:
            nonlocal moved
            moved = time.monotonic()

        work = self._puller.pull(
            CRI_NAMESPACE, name, snapshotter=snapshotter, credentials=self._credentials(credentials, domain),
            labels=labels, progress=progress,
        )
        if not self._stall:
            return await work
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._stall) as limit:

                def look_again() -> None:
                    limit.reschedule(loop.time() + max(0.0, self._stall - (time.monotonic() - moved)))

                ticker = _Ticker(loop, min(1.0, self._stall / 4), look_again)
                try:
                    return await work
                finally:
                    ticker.stop()
        except TimeoutError:
            raise errors.DeadlineExceeded(
                f"no progress for {self._stall:g} s while pulling {name!r}", kind="image", key=name
            ) from None

    async def unpack(self, namespace: str, image: Image, snapshotter: str) -> None:
        """Make an image's layers there for a snapshotter."""
        await self._puller.unpack(namespace, image, snapshotter)


class _Ticker:
    """Calls something again and again on the loop until stopped."""

    def __init__(self, loop: asyncio.AbstractEventLoop, pause: float, call: Any) -> None:
        self._loop, self._pause, self._call = loop, pause, call
        self._timer = loop.call_later(pause, self._tick)

    def _tick(self) -> None:
        self._call()
        self._timer = self._loop.call_later(self._pause, self._tick)

    def stop(self) -> None:
        """No more calls."""
        self._timer.cancel()
