"""Between values of `model` and columns of the database; label updates; filter adaptors.

Owns how labels, extensions and Any values are written into columns, and the rules that all stores
share: field paths on labels, empty label values, what a filter can see of an object.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence

from supervisord_ctr.errors import InvalidArgument
from supervisord_ctr.filters import Adaptor
from supervisord_ctr.metadata.engine import Transaction, Value
from supervisord_ctr.model import (
    Container,
    ContentInfo,
    Image,
    IngestStatus,
    Lease,
    Sandbox,
    SnapshotInfo,
    TypedValue,
)
from supervisord_ctr.names import check_identifier, check_label

_KINDS = {1: "view", 2: "active", 3: "committed"}


def ensure_namespace(tx: Transaction, namespace: str) -> None:
    """Namespaces come into being with the first object in them."""
    tx.execute("INSERT OR IGNORE INTO namespaces (name) VALUES (?)", (namespace,))


def check_namespace(namespace: str) -> str:
    """Return `namespace` when it may be one."""
    return check_identifier(namespace, "namespace")


def checked_labels(labels: Mapping[str, str] | None, what: str) -> dict[str, str]:
    """A copy without empty values (an empty value means "no such label", as in containerd); lengths are checked."""
    kept = {}
    for key, value in (labels or {}).items():
        try:
            check_label(key, value)
        except InvalidArgument as error:
            raise InvalidArgument(f"{what}: {error.message}", kind="label", key=key) from None
        if value:
            if not key:
                raise InvalidArgument(f"{what}: keys must not be empty", kind="label")
            kept[key] = value
    return kept


def dump_map(values: Mapping[str, str]) -> str | None:
    """Labels or annotations as a column."""
    kept = {key: value for key, value in values.items() if value}
    return json.dumps(kept, separators=(",", ":"), ensure_ascii=False) if kept else None


def load_map(text: str | None) -> dict[str, str]:
    """The reverse of `dump_map`."""
    return json.loads(text) if text else {}


def dump_any(value: TypedValue | None) -> tuple[Value, Value]:
    """An Any as two columns."""
    return (None, None) if value is None else (value.type_url, value.value)


def load_any(url: str | None, value: bytes | None) -> TypedValue | None:
    """The reverse of `dump_any`."""
    return None if url is None else TypedValue(url, value or b"")


def dump_extensions(extensions: Mapping[str, TypedValue]) -> str | None:
    """Extensions as a column."""
    if not extensions:
        return None
    packed = {key: [value.type_url, base64.b64encode(value.value).decode()] for key, value in extensions.items()}
    return json.dumps(packed, separators=(",", ":"))


def load_extensions(text: str | None) -> dict[str, TypedValue]:
    """The reverse of `dump_extensions`."""
    if not text:
        return {}
    return {key: TypedValue(url, base64.b64decode(value)) for key, (url, value) in json.loads(text).items()}


def update_labels(
    current: Mapping[str, str], wanted: Mapping[str, str], fieldpaths: Sequence[str], what: str
) -> dict[str, str]:
    """Labels after an update that may touch labels only.

    No path replaces all; "labels" replaces all; "labels.KEY" sets one, an empty value removes it.
    InvalidArgument for any other path.
    """
    if not fieldpaths:
        return dict(wanted)
    result = dict(current)
    for path in fieldpaths:
        if path.startswith("labels."):
            key = path.removeprefix("labels.")
            result[key] = wanted.get(key, "")
        elif path == "labels":
            result = dict(wanted)
        else:
            raise InvalidArgument(f'cannot update "{path}" field on {what}', kind="fieldpath", key=path)
    return result


def _in_map(path: Sequence[str], values: Mapping[str, str]) -> tuple[str, bool]:
    key = ".".join(path)
    return values.get(key, ""), key in values


def _text(value: str) -> tuple[str, bool]:
    return value, bool(value)


def adapt_container(container: Container) -> Adaptor:
    """Fields id, image, runtime.name, labels."""

    def field(path: Sequence[str]) -> tuple[str, bool]:
        match list(path):
            case ["id", *_]:
                return _text(container.id)
            case ["image", *_]:
                return _text(container.image)
            case ["runtime", "name", *_]:
                return _text(container.runtime.name)
            case ["labels", *rest]:
                return _in_map(rest, container.labels)
            case _:
                return "", False

    return field


def adapt_image(image: Image) -> Adaptor:
    """Fields name, target.digest, target.mediatype, labels, annotations."""

    def field(path: Sequence[str]) -> tuple[str, bool]:
        match list(path):
            case ["name", *_]:
                return _text(image.name)
            case ["target", "digest", *_]:
                return _text(image.target.digest)
            case ["target", "mediatype", *_]:
                return _text(image.target.media_type)
            case ["labels", *rest]:
                return _in_map(rest, image.labels)
            case ["annotations", *rest]:
                return _in_map(rest, image.target.annotations)
            case _:
                return "", False

    return field


def adapt_content(info: ContentInfo) -> Adaptor:
    """Fields digest, labels; a size cannot be asked for."""

    def field(path: Sequence[str]) -> tuple[str, bool]:
        match list(path):
            case ["digest", *_]:
                return info.digest, True
            case ["labels", *rest]:
                return _in_map(rest, info.labels)
            case _:
                return "", False

    return field


def adapt_ingest(status: IngestStatus) -> Adaptor:
    """The field ref."""
    return lambda path: (status.ref, True) if path and path[0] == "ref" else ("", False)


def adapt_lease(lease: Lease) -> Adaptor:
    """Fields id, labels."""

    def field(path: Sequence[str]) -> tuple[str, bool]:
        match list(path):
            case ["id", *_]:
                return _text(lease.id)
            case ["labels", *rest]:
                return _in_map(rest, lease.labels)
            case _:
                return "", False

    return field


def adapt_sandbox(sandbox: Sandbox) -> Adaptor:
    """Fields id, labels."""

    def field(path: Sequence[str]) -> tuple[str, bool]:
        match list(path):
            case ["id", *_]:
                return sandbox.id, True
            case ["labels", *rest]:
                return _in_map(rest, sandbox.labels)
            case _:
                return "", False

    return field


def adapt_snapshot(info: SnapshotInfo) -> Adaptor:
    """Fields kind, name, parent, labels."""

    def field(path: Sequence[str]) -> tuple[str, bool]:
        match list(path):
            case ["kind", *_]:
                kind = _KINDS.get(info.kind, "")
                return kind, bool(kind)
            case ["name", *_]:
                return info.name, True
            case ["parent", *_]:
                return info.parent, True
            case ["labels", *rest]:
                return _in_map(rest, info.labels)
            case _:
                return "", False

    return field
