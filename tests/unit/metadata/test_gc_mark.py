"""The pure part of garbage collection: reachability and the meaning of labels."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from supervisord_ctr.metadata.gc import (
    CONTAINER,
    CONTENT,
    IMAGE,
    SNAPSHOT,
    Graph,
    Node,
    duration,
    expiry,
    is_root,
    mark,
    parse_time,
    references,
)


def content(key: str) -> Node:
    return Node(CONTENT, "ns", key)


def test_mark_follows_edges_and_survives_cycles() -> None:
    edges = {content("a"): [content("b")], content("b"): [content("a"), content("c")], content("d"): [content("a")]}
    assert mark([content("a")], lambda node: edges.get(node, [])) == {content("a"), content("b"), content("c")}
    assert mark([], lambda node: edges.get(node, [])) == set()


@settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.integers(0, 20), st.lists(st.integers(0, 20), max_size=4)), st.sets(st.integers(0, 20)))
def test_marked_is_the_smallest_closed_set(edges: dict[int, list[int]], roots: set[int]) -> None:
    def follow(node: Node) -> list[Node]:
        return [content(str(other)) for other in edges.get(int(node.key), [])]

    marked = mark([content(str(root)) for root in roots], follow)
    assert {content(str(root)) for root in roots} <= marked
    for node in marked:
        assert set(follow(node)) <= marked
    reached = set(roots)
    while True:
        wider = reached | {other for node in reached for other in edges.get(node, [])}
        if wider == reached:
            break
        reached = wider
    assert {int(node.key) for node in marked} == reached


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("containerd.io/gc.ref.content", Node(CONTENT, "ns", "v")),
        ("containerd.io/gc.ref.content.0", Node(CONTENT, "ns", "v")),
        ("containerd.io/gc.ref.content/config", Node(CONTENT, "ns", "v")),
        ("containerd.io/gc.ref.contents", None),
        ("containerd.io/gc.ref.snapshot.overlayfs", Node(SNAPSHOT, "ns", "overlayfs/v")),
        ("containerd.io/gc.ref.snapshot.overlayfs/parent", Node(SNAPSHOT, "ns", "overlayfs/v")),
        ("containerd.io/gc.ref.image", Node(IMAGE, "ns", "v")),
        ("containerd.io/gc.ref.image.1", Node(IMAGE, "ns", "v")),
        ("containerd.io/gc.ref.container", None),
        ("other", None),
    ],
)
def test_reference_labels(label: str, expected: Node | None) -> None:
    assert list(references("ns", {label: "v"})) == ([] if expected is None else [expected])


def test_back_references_make_edges_from_the_named_object() -> None:
    graph = Graph(0.0)
    graph.refer(content("child"), {"containerd.io/gc.bref.container": "c1", "containerd.io/gc.bref.snapshot.o/x": "s"})
    assert list(graph.edges(Node(CONTAINER, "ns", "c1"))) == [content("child")]
    assert list(graph.edges(Node(SNAPSHOT, "ns", "o/s"))) == [content("child")]


def test_flat_nodes_follow_structure_only() -> None:
    graph = Graph(0.0)
    image = Node(IMAGE, "ns", "i")
    graph.link(image, content("target"))
    graph.refer(image, {"containerd.io/gc.ref.content.1": "more"})
    graph.refer(content("target"), {"containerd.io/gc.ref.content.1": "layer"})
    graph.all = [image, content("target"), content("layer"), content("more")]
    graph.roots = {image._replace(flat=True)}
    assert graph.garbage() == [content("layer"), content("more")]
    graph.roots = {image}
    assert graph.garbage() == []


@pytest.mark.parametrize(("condition", "kept"), [
    ("usedat<1h", True), ("usedat>1h", False), ("usedat>1m", True), ("nonsense,usedat<1h", True), ("usedat<x", False),
    ("usedat=1h", False), ("other<1h", False),
])
def test_conditions_on_snapshots(condition: str, kept: bool) -> None:
    graph = Graph(now := parse_time("2026-01-01T00:10:00Z") or 0.0)
    snapshot = Node(SNAPSHOT, "ns", "o/s")
    graph.refer(content("a"), {"containerd.io/gc.cond.snapshot.o": f"{condition}|s"})
    graph.refer(snapshot, {"containerd.io/gc.cond.value-usedat": "2026-01-01T00:00:00Z"})
    graph.close()
    graph.all, graph.roots = [content("a"), snapshot], {content("a")}
    assert (graph.garbage() == []) is kept
    assert now > 0


@pytest.mark.parametrize(("text", "expected"), [
    ("2026-01-01T00:00:00Z", 1767225600.0), ("2026-01-01T01:00:00+01:00", 1767225600.0),
    ("2026-01-01T00:00:00.5Z", 1767225600.5), ("2026-01-01T00:00:00", None), ("tomorrow", None), ("", None),
])
def test_times(text: str, expected: float | None) -> None:
    assert parse_time(text) == expected
    assert expiry({"containerd.io/gc.expire": text}) == expected
    assert expiry({}) is None


@pytest.mark.parametrize(("text", "expected"), [
    ("1h", 3600), ("1h30m", 5400), ("1.5s", 1.5), ("10ms", 0.01), ("-2s", -2), ("0", 0), ("", None), ("1", None),
    ("1d", None), ("h", None), ("1h x", None),
])
def test_durations(text: str, expected: float | None) -> None:
    assert duration(text) == expected


def test_root_labels() -> None:
    assert is_root({"containerd.io/gc.root": "2026"})
    assert not is_root({"containerd.io/gc.ref.content": "x"})


def test_expiry_is_remembered_for_the_timer() -> None:
    graph = Graph(100.0)
    assert not graph.expires(None)
    assert graph.expires(99.0)
    assert not graph.expires(300.0)
    assert not graph.expires(200.0)
    assert graph.next_expiry == 200.0
