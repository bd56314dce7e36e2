"""Which entry of an index a machine runs."""

from __future__ import annotations

import pytest

from supervisord_ctr.errors import InvalidArgument
from supervisord_ctr.images import platforms
from supervisord_ctr.model import Descriptor, Platform


def entry(text: str) -> Descriptor:
    parts = [*text.split("/"), ""]
    return Descriptor("m", "sha256:" + "0" * 64, 1, platform=Platform(parts[0], parts[1], parts[2]))


@pytest.mark.parametrize(("text", "described"), [
    ("linux/amd64", "linux/amd64"), ("amd64", "linux/amd64"), ("x86_64", "linux/amd64"), ("arm64", "linux/arm64"),
    ("linux/arm64/v8", "linux/arm64"), ("aarch64", "linux/arm64"), ("arm", "linux/arm/v7"), ("armhf", "linux/arm/v7"),
    ("linux/arm/v6", "linux/arm/v6"), ("linux/arm/7", "linux/arm/v7"), ("windows/amd64", "windows/amd64"),
    ("linux/amd64/v1", "linux/amd64"), ("linux/amd64/v3", "linux/amd64/v3"), ("macos/arm64", "darwin/arm64"),
])
def test_spellings(text: str, described: str) -> None:
    assert platforms.describe(platforms.parse(text)) == described


@pytest.mark.parametrize("text", ["", "a/b/c/d", "linux/", "toaster", "linux/am d64"])
def test_no_platforms(text: str) -> None:
    with pytest.raises(InvalidArgument):
        platforms.parse(text)


@pytest.mark.parametrize(("wanted", "offered", "order"), [
    ("linux/arm/v7", ["linux/arm/v5", "linux/arm/v6", "linux/amd64"], ["linux/arm/v6", "linux/arm/v5"]),
    ("linux/amd64", ["linux/386", "linux/amd64/v2", "linux/amd64"], ["linux/amd64", "linux/386"]),
    ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v2"], ["linux/amd64/v2", "linux/amd64"]),
    ("linux/arm64", ["linux/arm/v7", "linux/arm64/v8"], ["linux/arm64/v8", "linux/arm/v7"]),
    ("linux/amd64", ["windows/amd64", "unknown/unknown"], []),
])
def test_order_of_preference(wanted: str, offered: list[str], order: list[str]) -> None:
    found = platforms.best(platforms.parse(wanted), map(entry, offered))
    assert [platforms.describe(d.platform) for d in found if d.platform] == order


def test_a_hostile_variant_costs_nothing() -> None:
    assert platforms.best(Platform("linux", "arm", "v999999999"), [entry("linux/arm/v7")]) == []
