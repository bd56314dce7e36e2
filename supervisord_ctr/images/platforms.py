"""Platforms: which entry of an index a machine runs.

Owns parsing, normalising and the order of preference among variants, as containerd's `platforms`
has them. Source: OCI image specification, image-index.md; Go's GOARCH names.
"""

from __future__ import annotations

import os
import platform as machine
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from supervisord_ctr.errors import InvalidArgument
from supervisord_ctr.model import Descriptor, Platform

_WORD = re.compile(r"[A-Za-z0-9_.-]+\Z")
_ARCHITECTURES = {
    "x86_64": ("amd64", ""), "x86-64": ("amd64", ""), "i386": ("386", ""), "i486": ("386", ""), "i586": ("386", ""),
    "i686": ("386", ""), "aarch64": ("arm64", ""), "arm64": ("arm64", ""), "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"), "armv7l": ("arm", "v7"), "armv6l": ("arm", "v6"),
    "ppc64le": ("ppc64le", ""), "s390x": ("s390x", ""),
    "riscv64": ("riscv64", ""), "loongarch64": ("loong64", ""),
}
_KNOWN = {
    "amd64", "386", "arm", "arm64", "ppc64le", "ppc64", "s390x", "riscv64", "mips64le", "mips64", "loong64", "wasm",
}
_LEVEL = re.compile(r"v([1-9])\Z")
_SYSTEMS = {"linux", "windows", "darwin", "freebsd", "wasip1", "js"}


def normalize(platform: Platform) -> Platform:
    """The canonical spelling: aliases resolved, variants that mean the default dropped."""
    system = platform.os.lower().replace("macos", "darwin") or "linux"
    architecture, variant = platform.architecture.lower(), platform.variant.lower()
    if architecture in _ARCHITECTURES:
        architecture, implied = _ARCHITECTURES[architecture]
        variant = variant or implied
    if architecture == "amd64" and variant == "v1":
        variant = ""
    if architecture == "arm64" and variant in ("8", "v8", "v8.0"):
        variant = ""
    if architecture == "arm":
        variant = variant or "v7"
        variant = f"v{variant}" if variant.isdigit() else variant
    return Platform(system, architecture, variant, platform.os_version)


@lru_cache(maxsize=1)
def default() -> Platform:
    """This machine's platform."""
    return normalize(Platform("linux", machine.machine() or os.uname().machine))


def parse(text: str) -> Platform:
    """`OS`, `ARCH`, `OS/ARCH` or `OS/ARCH/VARIANT`; InvalidArgument otherwise."""
    parts = text.split("/")
    if len(parts) > 3 or not all(_WORD.match(part) for part in parts):
        raise InvalidArgument(
            f"invalid platform {text[:100]!r}: expected OS/ARCHITECTURE[/VARIANT]", kind="platform", key=text
        )
    if len(parts) > 1:
        return normalize(Platform(parts[0], parts[1], parts[2] if len(parts) == 3 else ""))
    word = parts[0].lower()
    if word in _SYSTEMS:
        here = default()
        return Platform(word, here.architecture, here.variant)
    found = normalize(Platform("linux", word))
    if found.architecture not in _KNOWN:
        raise InvalidArgument(f"invalid platform {text!r}: unknown system or architecture", kind="platform", key=text)
    return found


def describe(platform: Platform) -> str:
    """`OS/ARCH[/VARIANT]`."""
    return "/".join(part for part in (platform.os, platform.architecture, platform.variant) if part)


def _runs(platform: Platform) -> list[Platform]:
    """What a machine of `platform` can run, best first."""
    wanted = normalize(platform)
    system, architecture, variant = wanted.os, wanted.architecture, wanted.variant
    found = [wanted]
    level = int(match[1]) if (match := _LEVEL.match(variant)) else 0
    if architecture == "amd64":
        found += [Platform(system, "amd64", f"v{lower}" if lower > 1 else "") for lower in range(level - 1, 0, -1)]
        found.append(Platform(system, "386"))
    elif architecture == "arm":
        found += [Platform(system, "arm", f"v{lower}") for lower in range(level - 1, 4, -1)]
    elif architecture == "arm64":
        if variant:
            found.append(Platform(system, "arm64"))
        found += [Platform(system, "arm", f"v{lower}") for lower in range(8, 4, -1)]
    return found


def rank(wanted: Platform, offered: Platform) -> int | None:
    """How well `offered` serves `wanted`: 0 is exact, more is worse, None is not at all."""
    offer = normalize(offered)
    for index, candidate in enumerate(_runs(wanted)):
        if (candidate.os, candidate.architecture, candidate.variant) == (offer.os, offer.architecture, offer.variant):
            return index
    return None


def best(wanted: Platform, descriptors: Iterable[Descriptor]) -> list[Descriptor]:
    """The descriptors that `wanted` can run, best first; those that state no platform come last."""
    ranked = []
    for position, descriptor in enumerate(descriptors):
        if descriptor.platform is None or not descriptor.platform.architecture:
            ranked.append((1000, position, descriptor))
        elif (value := rank(wanted, descriptor.platform)) is not None:
            ranked.append((value, position, descriptor))
    return [descriptor for _, _, descriptor in sorted(ranked, key=lambda item: item[:2])]


def matches_any(wanted: Sequence[Platform], offered: Platform | None) -> bool:
    """Whether `offered` serves any of `wanted`; no wish and no stated platform fit everything."""
    return not wanted or offered is None or any(rank(platform, offered) is not None for platform in wanted)
