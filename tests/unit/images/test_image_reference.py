"""What an image may be called, and what that means in full."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisord_ctr.errors import InvalidArgument
from supervisord_ctr.images import reference

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(("text", "canonical", "familiar"), [
    ("busybox", "docker.io/library/busybox:latest", "busybox:latest"),
    ("busybox:1.36", "docker.io/library/busybox:1.36", "busybox:1.36"),
    ("user/app", "docker.io/user/app:latest", "user/app:latest"),
    ("index.docker.io/busybox", "docker.io/library/busybox:latest", "busybox:latest"),
    ("localhost/app", "localhost/app:latest", "localhost/app:latest"),
    ("localhost:5000/a/b:t", "localhost:5000/a/b:t", "localhost:5000/a/b:t"),
    ("[::1]:5000/app", "[::1]:5000/app:latest", "[::1]:5000/app:latest"),
    ("registry.k8s.io/pause:3.9", "registry.k8s.io/pause:3.9", "registry.k8s.io/pause:3.9"),
    (f"busybox@{DIGEST}", f"docker.io/library/busybox@{DIGEST}", f"busybox@{DIGEST}"),
    (f"busybox:1@{DIGEST}", f"docker.io/library/busybox:1@{DIGEST}", f"busybox:1@{DIGEST}"),
])
def test_defaults_are_filled_in(text: str, canonical: str, familiar: str) -> None:
    parsed = reference.parse(text)
    assert (parsed.canonical(), parsed.familiar()) == (canonical, familiar)
    assert reference.parse(canonical) == parsed


@pytest.mark.parametrize("text", [
    "", "UPPER", "a//b", "a:b:c", "a:", "a@", "a@sha256:short", "-a", "a/../b", "../a", "a b", "a\n", "http://a/b",
    "x" * 300, "a:" + "t" * 129, "a" * 64, "localhost:99999999/a", "/a", "a/", ".", "a.b/", "a_/b",
])
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(InvalidArgument, match="invalid image reference"):
        reference.parse(text)


@given(st.text(max_size=60))
def test_any_text_is_a_reference_or_invalid(text: str) -> None:
    try:
        parsed = reference.parse(text)
    except InvalidArgument:
        return
    assert reference.parse(parsed.canonical()) == parsed
    assert ".." not in parsed.path.split("/")


def test_the_digest_decides_what_is_fetched() -> None:
    assert reference.parse(f"a:1@{DIGEST}").object == DIGEST
    assert reference.parse("a:1").object == "1"


@pytest.mark.parametrize(("text", "host"), [
    ("busybox", "docker.io"), ("ghcr.io/a/b:1", "ghcr.io"), ("localhost:5000/a", "localhost"),
    ("10.0.0.1:80/a", "10.0.0.1"), ("[::1]:5000/a", "::1"),
])
def test_sources_are_told_without_a_port(text: str, host: str) -> None:
    assert reference.parse(text).hostname == host
