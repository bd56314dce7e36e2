"""Names: what identifiers, labels and digests may look like.

Owns validation of everything that becomes a path component, a database key or a line in a file.
Every check raises `InvalidArgument` and says what was wrong with which value.
"""

from __future__ import annotations

import re

from supervisord_ctr.errors import InvalidArgument

#: Longest identifier, as containerd's `pkg/identifiers` has it.
MAX_IDENTIFIER = 76
#: Most bytes in a label's key and value together (containerd's `pkg/labels`).
MAX_LABEL = 4096

DEFAULT_NAMESPACE = "default"
CRI_NAMESPACE = "k8s.io"

LABEL_GC_ROOT = "containerd.io/gc.root"
LABEL_GC_EXPIRE = "containerd.io/gc.expire"
LABEL_GC_REF_CONTENT = "containerd.io/gc.ref.content"
LABEL_GC_REF_SNAPSHOT = "containerd.io/gc.ref.snapshot."
LABEL_SHAREABLE = "containerd.io/namespace.shareable"
LABEL_SNAPSHOT_REF = "containerd.io/snapshot.ref"
#: How the owners in a snapshot are to be mapped (`linux.idmaps.text`), and what a snapshotter says that can.
LABEL_UID_MAPPING = "containerd.io/snapshot/uidmapping"
LABEL_GID_MAPPING = "containerd.io/snapshot/gidmapping"
CAPABILITY_REMAP_IDS = "remap-ids"
LABEL_UNCOMPRESSED = "containerd.io/uncompressed"
LABEL_DISTRIBUTION_SOURCE = "containerd.io/distribution.source."

_IDENTIFIER = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*\Z")
_DIGEST = re.compile(r"(sha256:[0-9a-f]{64}|sha384:[0-9a-f]{96}|sha512:[0-9a-f]{128})\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def check_identifier(value: str, kind: str = "identifier") -> str:
    """Return `value` when it may name a container, task, exec, namespace or sandbox.

    Raises `InvalidArgument` when it is empty, longer than 76 characters or not runs of letters and
    digits separated by single `.`, `_` or `-`.
    """
    if not value:
        raise InvalidArgument(f"{kind} must not be empty", kind=kind)
    if len(value) > MAX_IDENTIFIER:
        raise InvalidArgument(
            f"{kind} {value[:MAX_IDENTIFIER]!r}… is {len(value)} characters long, at most {MAX_IDENTIFIER} are allowed",
            kind=kind, key=value,
        )
    if not _IDENTIFIER.match(value):
        raise InvalidArgument(
            f"{kind} {value!r} must be letters and digits, separated by single '.', '_' or '-'", kind=kind, key=value
        )
    return value


def check_label(key: str, value: str) -> None:
    """Raise `InvalidArgument` when key and value together exceed 4096 bytes."""
    size = len(key.encode()) + len(value.encode())
    if size > MAX_LABEL:
        shown = key if len(key) <= 64 else key[:64] + "…"
        raise InvalidArgument(
            f"label key and value length ({size} bytes) greater than maximum size ({MAX_LABEL} bytes), key: {shown}",
            kind="label", key=key,
        )


def check_labels(labels: dict[str, str]) -> None:
    """`check_label` for each."""
    for key, value in labels.items():
        check_label(key, value)


def check_digest(value: str) -> str:
    """Return `value` when it is a digest of the registered algorithms in lower-case hex.

    Source: OCI image specification, descriptor.md, "Digests".
    """
    if not _DIGEST.match(value):
        raise InvalidArgument(f"invalid digest {value!r}", kind="digest", key=value)
    return value


def is_digest(value: str) -> bool:
    """Whether `check_digest` would accept `value`."""
    return _DIGEST.match(value) is not None


def check_line(value: str, kind: str) -> str:
    """Return `value` when it holds no control bytes (S10: nothing may inject a line anywhere)."""
    if _CONTROL.search(value):
        raise InvalidArgument(f"{kind} {value!r} must not hold control characters", kind=kind, key=value)
    return value
