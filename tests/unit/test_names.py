"""Names: identifiers, labels, digests and lines."""

from __future__ import annotations

import pytest

from supervisord_ctr import names
from supervisord_ctr.errors import InvalidArgument


@pytest.mark.parametrize("value", ["a", "a-b", "a.b_c-d", "A1", "0", "x" * 76])
def test_identifiers_that_containerd_accepts(value: str) -> None:
    assert names.check_identifier(value) == value


@pytest.mark.parametrize(
    "value",
    ["", "x" * 77, "-a", "a-", "a..b", "a--b", "a/b", "..", "a b", "a\n", "ä", "../x", "a\0", ".", "a__b"],
)
def test_s11_identifiers_that_would_be_paths_or_lines_are_refused(value: str) -> None:
    with pytest.raises(InvalidArgument):
        names.check_identifier(value)


def test_label_limit_counts_key_and_value_in_bytes() -> None:
    names.check_label("k" * 96, "v" * 4000)
    with pytest.raises(InvalidArgument, match="maximum size"):
        names.check_label("k" * 97, "v" * 4000)
    with pytest.raises(InvalidArgument):
        names.check_label("k", "ä" * 2048)


@pytest.mark.parametrize("value", ["sha256:" + "a" * 64, "sha512:" + "0" * 128])
def test_digests(value: str) -> None:
    assert names.check_digest(value) == value
    assert names.is_digest(value)


@pytest.mark.parametrize("value", ["", "sha256:", "sha256:" + "A" * 64, "sha256:" + "a" * 63, "md5:" + "a" * 32,
                                   "sha256:" + "a" * 64 + "\n", "sha256:../" + "a" * 61])
def test_what_is_no_digest(value: str) -> None:
    assert not names.is_digest(value)
    with pytest.raises(InvalidArgument):
        names.check_digest(value)


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\0b", "\x7f"])
def test_s10_control_bytes_are_refused(value: str) -> None:
    with pytest.raises(InvalidArgument, match="hostname"):
        names.check_line(value, "hostname")
