"""Manifests, configurations and names, read as hostile input."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisord_ctr.errors import InvalidArgument
from supervisord_ctr.images import manifest as documents
from supervisord_ctr.images.config import chain_ids, parse_config
from supervisord_ctr.images.naming import IMAGE_NAME, REF_NAME, REF_SOURCE, NameRule, image_names
from supervisord_ctr.images.registry import parse_content_range, retry_delay
from supervisord_ctr.model import Descriptor

A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64


def test_chain_ids_follow_the_specification() -> None:
    assert chain_ids([A]) == [A]
    import hashlib

    assert chain_ids([A, B])[1] == "sha256:" + hashlib.sha256(f"{A} {B}".encode()).hexdigest()


def test_gc_labels_are_containerd_s() -> None:
    children = [
        Descriptor(documents.OCI_CONFIG, A, 1), Descriptor(documents.OCI_LAYER_GZIP, A, 1),
        Descriptor(documents.DOCKER_LAYER_GZIP, B, 1), Descriptor(documents.OCI_MANIFEST, B, 1),
        Descriptor("application/other", A, 1),
    ]
    assert documents.gc_labels(children) == {
        "containerd.io/gc.ref.content.config": A, "containerd.io/gc.ref.content.l.0": A,
        "containerd.io/gc.ref.content.l.1": B, "containerd.io/gc.ref.content.m.0": B,
        "containerd.io/gc.ref.content.0": A,
    }


@pytest.mark.parametrize("change", [
    {"config": None}, {"config": {"digest": "x"}}, {"layers": "x"}, {"layers": [1]},
    {"layers": [{"mediaType": "t", "digest": A, "size": -1}]}, {"layers": [{"mediaType": 5, "digest": A, "size": 1}]},
    {"layers": [{"mediaType": "t", "digest": "sha256:../../etc", "size": 1}]}, {"manifests": []}, {"schemaVersion": 1},
    {"mediaType": documents.OCI_INDEX}, {"fsLayers": []}, {"annotations": {"a": 1}},
])
def test_s15_broken_manifests(change: dict[str, object]) -> None:
    good = {"schemaVersion": 2, "config": {"mediaType": documents.OCI_CONFIG, "digest": A, "size": 1}, "layers": []}
    documents.parse(json.dumps(good).encode(), documents.OCI_MANIFEST, "m")
    with pytest.raises(InvalidArgument):
        documents.parse(json.dumps({**good, **change}).encode(), documents.OCI_MANIFEST, "m")


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["config", "layers", "manifests", "digest", "size", "mediaType", "platform", "rootfs", "Env",
                         "diff_ids", "Labels", "annotations"]), inner, max_size=5),
    max_leaves=20,
))
def test_any_json_is_a_document_or_invalid(value: object) -> None:
    data = json.dumps(value).encode()
    for media_type in (documents.OCI_MANIFEST, documents.OCI_INDEX):
        try:
            documents.parse(data, media_type, "x")
        except InvalidArgument:
            pass
    try:
        parse_config(data, "x")
    except InvalidArgument:
        pass


@pytest.mark.parametrize("media_type", [
    documents.OCI_LAYER, documents.OCI_LAYER_GZIP, documents.OCI_LAYER_ZSTD, documents.DOCKER_LAYER_GZIP,
    documents.DOCKER_LAYER, documents.DOCKER_FOREIGN + ".gzip", documents.OCI_NONDISTRIBUTABLE + "+gzip",
])
def test_layers_that_can_be_read(media_type: str) -> None:
    documents.check_layer_type(media_type)


@pytest.mark.parametrize("media_type", [
    documents.OCI_LAYER_GZIP + "+encrypted", documents.OCI_CONFIG, "", documents.OCI_LAYER + "+br", "text/tar",
])
def test_layers_that_cannot(media_type: str) -> None:
    with pytest.raises(InvalidArgument):
        documents.check_layer_type(media_type)


def test_names_of_imported_images() -> None:
    named = Descriptor("m", A, 1, {REF_SOURCE: "annotation", IMAGE_NAME: "docker.io/library/app:1", REF_NAME: "1"})
    tagged = Descriptor("m", A, 1, {REF_SOURCE: "annotation", REF_NAME: "v2"})
    bare = Descriptor("m", A, 1, {REF_SOURCE: "annotation"})
    every = (NameRule("docker.io/library/app", True),)
    assert image_names(named, "", every) == ["docker.io/library/app:1"]
    assert image_names(tagged, "", every) == ["docker.io/library/app:v2"]
    assert image_names(bare, "", every) == []
    assert image_names(named, "", (NameRule("docker.io/library/ap", True),)) == []
    assert image_names(named, "", (NameRule("other", True, allow_overwrite=True),)) == ["docker.io/library/app:1"]
    digests = (NameRule("pre", True, add_digest=True),)
    assert image_names(bare, "", digests) == [f"pre@{A}"]
    assert image_names(tagged, "", digests) == ["pre:v2", f"pre@{A}"]
    assert image_names(tagged, "", (NameRule("pre", True, add_digest=True, skip_named_digest=True),)) == ["pre:v2"]
    assert image_names(Descriptor("m", A, 1), "name", (NameRule("extra"), *digests)) == ["name", "extra", f"pre@{A}"]


@pytest.mark.parametrize(("text", "found"), [
    ("bytes 5-9/10", (5, 10)), ("bytes 5-9/*", (5, None)), ("bytes */10", (-1, None)), ("", (-1, None)),
    ("items 5-9/10", (-1, None)), ("bytes x-9/10", (-1, None)),
])
def test_content_ranges(text: str, found: tuple[int, int | None]) -> None:
    assert parse_content_range(text) == found


def test_p2_delays_are_bounded() -> None:
    assert retry_delay(0, "3600") == 30
    assert retry_delay(0, "2") == 2
    assert retry_delay(0, "Thu, 01 Jan 1970 00:00:00 GMT") == 0
    assert 0 < retry_delay(60) <= 10
    assert 0 < retry_delay(0, "soon") < 1
