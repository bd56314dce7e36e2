"""A registry that misbehaves on demand: it drops, stalls, lies, redirects and asks for passwords.

Serves images from memory on a free port of 127.0.0.1, on threads of its own. `rules` are asked for
each request and may answer it themselves.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.images import OCI_INDEX, BuiltImage, digest_of


@dataclass
class Seen:
    """One request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    query: dict[str, list[str]] = field(default_factory=dict)
    body: bytes = b""


#: Takes a request; whether it answered.
Rule = Callable[["Handler", Seen], bool]


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Silent."""

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        """A whole answer."""
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_part(self, body: bytes, sent: int, headers: dict[str, str] | None = None, status: int = 200) -> None:
        """Announce all of `body`, send `sent` bytes of it and drop the connection."""
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[:sent])
        self.wfile.flush()
        self.close_connection = True

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        seen = Seen(
            self.command, parts.path, {key.lower(): value for key, value in self.headers.items()},
            parse_qs(parts.query), self.rfile.read(length),
        )
        registry = self.server.registry
        with registry.lock:
            registry.seen.append(seen)
            rules = list(registry.rules)
        try:
            for rule in rules:
                if rule(self, seen):
                    return
            registry.serve(self, seen)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = _handle  # noqa: N815


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    registry: FakeRegistry

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may go away."""


class FakeRegistry:
    """The images and the rules of one registry."""

    def __init__(self) -> None:
        self.rules: list[Rule] = []
        self.seen: list[Seen] = []
        self.lock = threading.Lock()
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[tuple[str, str], tuple[bytes, str]] = {}
        self.stopped = threading.Event()
        self.address = ""

    def add(self, repository: str, tag: str, image: BuiltImage) -> str:
        """Serve `image`; returns its reference."""
        self.blobs.update(image.blobs)
        for name, body, media_type in (
            (tag, image.index, OCI_INDEX), (image.target, image.index, OCI_INDEX),
            (digest_of(image.manifest), image.manifest, image.manifest_type),
        ):
            self.manifests[(repository, name)] = (body, media_type)
        return f"{self.address}/{repository}:{tag}"

    def requests(self, text: str = "", method: str = "GET") -> list[Seen]:
        """What was asked so far, with `text` in the path."""
        with self.lock:
            return [seen for seen in self.seen if text in seen.path and seen.method == method]

    def serve(self, handler: Handler, seen: Seen) -> None:
        """The honest answer."""
        parts = seen.path.split("/")
        if "manifests" in parts:
            at = parts.index("manifests")
            found = self.manifests.get(("/".join(parts[2:at]), "/".join(parts[at + 1:])))
            if found is not None:
                body, media_type = found
                handler.answer(200, body, {"Content-Type": media_type, "Docker-Content-Digest": digest_of(body)})
                return
        elif "blobs" in parts and parts[-1] in self.blobs:
            self.serve_blob(handler, seen, self.blobs[parts[-1]])
            return
        elif seen.path == "/v2/":
            handler.answer(200, b"{}")
            return
        error = {"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}
        handler.answer(404, json.dumps(error).encode(), {"Content-Type": "application/json"})

    def serve_blob(self, handler: Handler, seen: Seen, body: bytes) -> None:
        """A blob, from an offset when a range is asked for."""
        wanted = seen.headers.get("range", "")
        if wanted.startswith("bytes="):
            start = int(wanted[6:].partition("-")[0])
            if start >= len(body):
                handler.answer(416)
                return
            handler.answer(206, body[start:], {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"})
            return
        handler.answer(200, body, {"Content-Type": "application/octet-stream"})


@contextmanager
def fake_registry() -> Iterator[FakeRegistry]:
    """A running registry."""
    registry = FakeRegistry()
    server = _Server(("127.0.0.1", 0), Handler)
    server.registry = registry
    registry.address = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield registry
    finally:
        registry.stopped.set()
        server.shutdown()
        thread.join()
        server.server_close()


# Rules.

def drop_once(digest: str, after: int) -> Rule:
    """The first answer for a blob breaks off after so many bytes."""
    done = threading.Event()

    def rule(handler: Handler, seen: Seen) -> bool:
        if seen.method != "GET" or not seen.path.endswith(digest) or done.is_set():
            return False
        done.set()
        handler.answer_part(handler.server.registry.blobs[digest], after)
        return True

    return rule


def refuse(digest: str) -> Rule:
    """A blob is answered with 500 for as long as the rule stands."""

    def rule(handler: Handler, seen: Seen) -> bool:
        if not seen.path.endswith(digest):
            return False
        handler.answer(500, b"{}")
        return True

    return rule


def ignore_ranges(handler: Handler, seen: Seen) -> bool:
    """Every blob is sent whole whatever was asked."""
    name = seen.path.rpartition("/")[2]
    if seen.method != "GET" or "range" not in seen.headers or name not in handler.server.registry.blobs:
        return False
    handler.answer(200, handler.server.registry.blobs[name])
    return True


def ask_basic(user: str, secret: str) -> Rule:
    """Every request needs this user."""
    wanted = "Basic " + base64.b64encode(f"{user}:{secret}".encode()).decode()

    def rule(handler: Handler, seen: Seen) -> bool:
        if seen.headers.get("authorization") == wanted:
            return False
        handler.answer(401, b"{}", {"WWW-Authenticate": 'Basic realm="test"'})
        return True

    return rule
