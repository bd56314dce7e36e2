"""Garbage collection, the pure part: what is reachable, and what labels mean.

`mark` takes roots and edges and nothing else. `Graph` holds the edges that labels, parents and
targets make, as containerd defines them:

    containerd.io/gc.root                             a blob or snapshot that is a root by itself
    containerd.io/gc.ref.content[.…|/…]: DIGEST       refers to a blob
    containerd.io/gc.ref.snapshot.SNAPSHOTTER[/…]: KEY     refers to a snapshot
    containerd.io/gc.ref.image[.…|/…]: NAME           refers to an image
    containerd.io/gc.ref.mount[.…|/…]: NAME           refers to an activated mount
    containerd.io/gc.bref.{container,content,image}[.…|/…], gc.bref.snapshot.SNAPSHOTTER[/…]
                                                      refers back: the named object refers to this one
    containerd.io/gc.expire: RFC 3339                 a lease or image that is no root any more after that
    containerd.io/gc.flat                             a lease that protects its resources, not what they refer to
    containerd.io/gc.cond.snapshot[./]SNAPSHOTTER[/…]: usedat<24h[,…]|KEY
                                                      refers to a snapshot while its gc.cond.value-usedat fits
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import NamedTuple

CONTENT = "content"
SNAPSHOT = "snapshot"
CONTAINER = "container"
IMAGE = "image"
LEASE = "lease"
INGEST = "ingest"
MOUNT = "mount"

_PREFIX = "containerd.io/gc."
_ROOT = "containerd.io/gc.root"
_EXPIRE = "containerd.io/gc.expire"
_FLAT = "containerd.io/gc.flat"
_REF = "containerd.io/gc.ref."
_BACK_REF = "containerd.io/gc.bref."
_CONDITION = "containerd.io/gc.cond.snapshot"
_USED_AT = "containerd.io/gc.cond.value-usedat"


class Node(NamedTuple):
    """One object; a snapshot's key is `SNAPSHOTTER/KEY`. A flat node is followed by parents and targets only."""

    kind: str
    namespace: str
    key: str
    flat: bool = False


def mark(roots: Iterable[Node], edges: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """Every node that can be reached from the roots, the roots included; flat nodes come out as plain ones."""
    seen = set(roots)
    waiting = list(seen)
    while waiting:
        for node in edges(waiting.pop()):
            if node not in seen:
                seen.add(node)
                waiting.append(node)
    return {node._replace(flat=False) if node.flat else node for node in seen}


def matters(labels: str | None) -> bool:
    """Whether a column of labels can hold any that mean something here."""
    return labels is not None and _PREFIX in labels


def references(namespace: str, labels: Mapping[str, str], prefix: str = _REF) -> Iterable[Node]:
    """What an object with these labels refers to (or, with the other prefix, what refers back to it)."""
    kinds = {"content": CONTENT, "image": IMAGE}
    if prefix == _BACK_REF:
        kinds["container"] = CONTAINER
    else:
        kinds["mount"] = MOUNT
    for key, value in labels.items():
        if not key.startswith(prefix):
            continue
        rest = key.removeprefix(prefix)
        if rest.startswith("snapshot."):
            snapshotter = rest.removeprefix("snapshot.").partition("/")[0]
            yield Node(SNAPSHOT, namespace, f"{snapshotter}/{value}")
            continue
        word = re.split(r"[./]", rest, maxsplit=1)[0]
        if word in kinds:
            yield Node(kinds[word], namespace, value)


def parse_time(text: str) -> float | None:
    """Seconds since the epoch of an RFC 3339 time; None when it is none."""
    try:
        found = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None
    return found.timestamp() if found.tzinfo is not None else None


def expiry(labels: Mapping[str, str]) -> float | None:
    """When an object stops being a root; None when it never does (an unreadable value counts as none)."""
    text = labels.get(_EXPIRE)
    return parse_time(text) if text is not None else None


def is_flat(labels: Mapping[str, str]) -> bool:
    """Whether a lease is flat."""
    return _FLAT in labels


def is_root(labels: Mapping[str, str]) -> bool:
    """Whether the labels alone make a root."""
    return any(key.startswith(_ROOT) for key in labels)


class Graph:
    """Roots, edges and all collectable nodes of one moment. Built by the collector, then only read."""

    def __init__(self, now: float) -> None:
        self.now = now
        self.roots: set[Node] = set()
        self.all: list[Node] = []
        #: The earliest future moment at which a root stops being one.
        self.next_expiry: float | None = None
        self._edges: dict[Node, list[Node]] = defaultdict(list)
        self._structure: dict[Node, list[Node]] = defaultdict(list)
        self._conditions: list[tuple[Node, Node, Callable[[float], bool]]] = []
        self._used_at: dict[Node, float] = {}

    def expires(self, moment: float | None) -> bool:
        """Whether `moment` is past; a future one is remembered for the timer."""
        if moment is None:
            return False
        if moment < self.now:
            return True
        if self.next_expiry is None or moment < self.next_expiry:
            self.next_expiry = moment
        return False

    def link(self, source: Node, target: Node) -> None:
        """A parent or a target: followed from flat nodes, too."""
        self._structure[source].append(target)

    def refer(self, source: Node, labels: Mapping[str, str], *, back: bool = True) -> None:
        """Edges that the labels of `source` make; `back=False` leaves its back references out."""
        self._edges[source].extend(references(source.namespace, labels))
        if back:
            for other in references(source.namespace, labels, _BACK_REF):
                self._edges[other].append(source)
        for key, value in labels.items():
            if key.startswith(_CONDITION):
                self._condition(source, key, value)
        if source.kind == SNAPSHOT and _USED_AT in labels:
            used = parse_time(labels[_USED_AT])
            if used is not None:
                self._used_at[source] = used

    def _condition(self, source: Node, label: str, value: str) -> None:
        snapshotter = label.removeprefix(_CONDITION).lstrip("./").partition("/")[0]
        conditions, bar, key = value.partition("|")
        if not bar:
            return
        target = Node(SNAPSHOT, source.namespace, f"{snapshotter}/{key}")
        for text in conditions.split(","):
            found = re.fullmatch(r"usedat([<>])(.+)", text)
            span = duration(found.group(2)) if found else None
            if found is None or span is None:
                continue
            younger = found.group(1) == "<"
            self._conditions.append(
                (source, target, lambda used, span=span, younger=younger: (self.now - used < span) == younger)  # type: ignore[misc]
            )

    def close(self) -> None:
        """Turn conditions into edges, once every label was seen."""
        for source, target, holds in self._conditions:
            used = self._used_at.get(target)
            if used is not None and holds(used):
                self._edges[source].append(target)

    def edges(self, node: Node) -> Iterable[Node]:
        """What `node` refers to."""
        if node.flat:
            plain = node._replace(flat=False)
            return [target._replace(flat=True) for target in self._structure.get(plain, ())]
        return [*self._structure.get(node, ()), *self._edges.get(node, ())]

    def garbage(self) -> list[Node]:
        """Every collectable node that no root reaches."""
        reachable = mark(self.roots, self.edges)
        return [node for node in self.all if node not in reachable]


_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def duration(text: str) -> float | None:
    """Seconds of a Go duration ("1h30m", "-2s"); None when it is none."""
    sign = -1.0 if text.startswith("-") else 1.0
    body = text.lstrip("+-")
    if body == "0":
        return 0.0
    parts = re.findall(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)", body)
    if not parts or "".join(number + unit for number, unit in parts) != body:
        return None
    return sign * sum(float(number) * _UNITS[unit] for number, unit in parts)
