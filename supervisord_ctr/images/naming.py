"""Naming: under which names an imported or pulled descriptor goes into the image store.

Owns the rules that clients send with an image store (prefixes, digests) and what archives call their
images. Source: containerd.types.transfer.ImageReference; OCI image layout, "annotations".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from supervisord_ctr.errors import InvalidArgument
from supervisord_ctr.images import reference
from supervisord_ctr.model import Descriptor

#: The full name of an image in an archive's index, as containerd writes it.
IMAGE_NAME = "io.containerd.image.name"
#: The name or tag in an OCI layout's index.
REF_NAME = "org.opencontainers.image.ref.name"
#: Marks descriptors whose names come from their own annotations.
REF_SOURCE = "io.containerd.import.ref-source"


@dataclass(frozen=True, slots=True)
class NameRule:
    """One further name, or with `is_prefix` a filter for and completion of the names in an archive."""

    name: str
    is_prefix: bool = False
    allow_overwrite: bool = False
    add_digest: bool = False
    skip_named_digest: bool = False


def image_names(descriptor: Descriptor, name: str, rules: Sequence[NameRule]) -> list[str]:
    """Every name that `name` and `rules` give to `descriptor`, in order; may be none."""
    names: list[str] = []
    if REF_SOURCE in descriptor.annotations:
        for rule in rules:
            if not rule.is_prefix:
                continue
            found = _from_annotations(descriptor, rule)
            if found:
                names.append(found)
            if rule.add_digest and not (found and rule.skip_named_digest):
                names.append(f"{rule.name}@{descriptor.digest}")
    else:
        if name:
            names.append(name)
        for rule in rules:
            if rule.add_digest:
                names.append(f"{rule.name}@{descriptor.digest}")
            elif not rule.is_prefix:
                names.append(rule.name)
    return list(dict.fromkeys(names))


def _from_annotations(descriptor: Descriptor, rule: NameRule) -> str:
    text = descriptor.annotations.get(IMAGE_NAME) or descriptor.annotations.get(REF_NAME) or ""
    if not text or not rule.name:
        return text if not rule.name and any(c in text for c in "/:@") else ""
    if any(character in text for character in "/:@"):
        if rule.allow_overwrite:
            return text
        fits = text.startswith(rule.name) and (len(text) == len(rule.name) or text[len(rule.name)] in "/:@")
        return text if fits else ""
    return f"{rule.name}:{text}"


def ref_name(name: str) -> str:
    """What an OCI layout calls an image: its tag, or the whole name when it has none."""
    try:
        return reference.parse(name).tag or name
    except InvalidArgument:
        return name
