"""References: what an image is called.

Owns the grammar and the defaults: `busybox` is `docker.io/library/busybox:latest`. Source:
distribution/reference's documented grammar and the OCI distribution specification, "Pulling manifests".
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from supervisord_ctr.errors import InvalidArgument
from supervisord_ctr.names import is_digest

DEFAULT_DOMAIN = "docker.io"
DEFAULT_TAG = "latest"
_OFFICIAL = "library/"
_MAX_NAME = 255

_DOMAIN = re.compile(
    r"(?:(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])(?:\.(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9]))*"
    r"|\[[a-fA-F0-9:]+\])(?::[0-9]{1,5})?\Z"
)
_PATH = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*\Z")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\Z")
_PORT = re.compile(r":[0-9]+\Z")
_HEX = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed reference; `tag` and `digest` may both be set, then the digest decides what is fetched."""

    domain: str
    path: str
    tag: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        """Domain and path: what a repository is called."""
        return f"{self.domain}/{self.path}"

    @property
    def hostname(self) -> str:
        """The domain without a port: what labels call a source of content."""
        host = _PORT.sub("", self.domain)
        return host[1:-1] if host.startswith("[") else host

    @property
    def object(self) -> str:
        """What is asked of the registry: the digest, else the tag."""
        return self.digest or self.tag or DEFAULT_TAG

    def canonical(self) -> str:
        """The full spelling, the key of the image store."""
        text = self.name
        if self.tag:
            text += f":{self.tag}"
        if self.digest:
            text += f"@{self.digest}"
        return text

    def familiar(self) -> str:
        """The short spelling for people."""
        text = self.canonical()
        if self.domain == DEFAULT_DOMAIN:
            text = text.removeprefix(f"{DEFAULT_DOMAIN}/")
            if self.path.count("/") == 1:
                text = text.removeprefix(_OFFICIAL)
        return text

    def __str__(self) -> str:
        return self.canonical()


def _is_domain(part: str) -> bool:
    return "." in part or ":" in part or part == "localhost" or part.lower() != part


def parse(text: str) -> Reference:
    """The reference for `text`, with defaults filled in; InvalidArgument says what is wrong with it."""

    def wrong(why: str) -> InvalidArgument:
        return InvalidArgument(f"invalid image reference {text[:300]!r}: {why}", kind="image", key=text)

    if not text:
        raise wrong("it is empty")
    if _HEX.match(text):
        raise wrong("64 hexadecimal digits are an id and not a name")
    rest, at, digest = text.partition("@")
    if at and not is_digest(digest):
        raise wrong(f"{digest[:100]!r} is not a digest")
    head, slash, tail = rest.partition("/")
    if slash and _is_domain(head):
        domain = head
    else:
        domain, tail = DEFAULT_DOMAIN, rest
    tag = ""
    if (colon := tail.rfind(":")) >= 0:
        tail, tag = tail[:colon], tail[colon + 1:]
        if not _TAG.match(tag):
            raise wrong(f"{tag[:140]!r} is not a tag")
    if domain == "index.docker.io":
        domain = DEFAULT_DOMAIN
    if domain == DEFAULT_DOMAIN and "/" not in tail:
        tail = _OFFICIAL + tail
    if not _DOMAIN.match(domain):
        raise wrong(f"{domain!r} is not a registry's host")
    if not _PATH.match(tail):
        if tail.lower() != tail:
            raise wrong("a repository's name must be lower case")
        raise wrong(f"{tail!r} is not a repository's name")
    if len(domain) + 1 + len(tail) > _MAX_NAME:
        raise wrong(f"a name may have at most {_MAX_NAME} characters")
    if not tag and not digest:
        tag = DEFAULT_TAG
    return Reference(domain, tail, tag, digest)
