"""The filter grammar: every operator, every quote, every refusal."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from supervisord_ctr.errors import InvalidArgument
from supervisord_ctr.filters import ALWAYS, Adaptor, parse

OBJECTS: list[dict[str, str]] = [
    {"name": "alpine", "labels.tier": "web"},
    {"name": "busybox"},
    {"name": "alpine", "labels.tier": "db", "labels.with blank": "yes"},
    {"name": "caddy", 'labels.odd \\ and "': "yes"},
    {"name": "caddy", "labels.io.example/role": "a.b-c_d"},
    {"name": "other", "note": "two words, and a comma"},
    {"name": "other", "note": "aabbcc"},
]


def adapt(entry: dict[str, str]) -> Adaptor:
    def field(path: Sequence[str]) -> tuple[str, bool]:
        key = ".".join(path)
        return entry.get(key, ""), key in entry

    return field


def matching(*texts: str) -> list[int]:
    parsed = parse(texts)
    return [number for number, entry in enumerate(OBJECTS) if parsed.matches(adapt(entry))]


EVERY = list(range(len(OBJECTS)))


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ((), EVERY),
        (("",), EVERY),
        (("name==nobody", ""), EVERY),
        (("name",), EVERY),
        (("labels.tier",), [0, 2]),
        (("labels.tier,name",), [0, 2]),
        (("labels.tier==web",), [0]),
        (("labels.tier!=web",), [1, 2, 3, 4, 5, 6]),
        (("name==alpine,labels.tier==db",), [2]),
        (("name==alpine,labels.tier==nothing",), []),
        (("name==busybox", "labels.tier==db"), [1, 2]),
        (('labels."with blank"',), [2]),
        (('labels."with blank"==yes',), [2]),
        ((r'labels."odd \\ and \""==yes',), [3]),
        (('labels."io.example/role"==a.b-c_d',), [4]),
        (('note=="two words, and a comma"',), [5]),
        (("note~=[abc]+,name!=alpine",), [5, 6]),
        (("note~=/^[abc]{6}$/",), [6]),
        (("note~=|^a{2,3}b|",), [6]),
        (("name~=^al",), [0, 2]),
        ((r"note~=/\/never/",), []),
        (("name==al.pine,name==x",), []),
        (("note~=[[:alpha:]]{6}",), [6]),
        (("note~=[",), []),
        (("  name  == alpine",), [0, 2]),
        (('name=="\\x61lpine"',), [0, 2]),
        (('name=="\\u0061lpine"',), [0, 2]),
        (('name=="\\141lpine"',), [0, 2]),
    ],
)
def test_matches(texts: tuple[str, ...], expected: list[int]) -> None:
    assert matching(*texts) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name==foo,", "[name==foo,]: expected field or quoted"),
        ("labels.", "[labels.]: expected field or quoted"),
        ("image~=,id?=?fbaq", "[image~= >|,|< id?=?fbaq]: expected value or quoted"),
        ("labels.ns/key==value", "[labels.ns >|/|< key==value]: quoted literal not terminated"),
        ("labels.key==/value", "[labels.key== >|/|< value]: quoted literal not terminated"),
        ("labels.|foo|==bar", "[labels. >|||< foo|==bar]: invalid quote encountered"),
        ("labels.?x==present", "[labels. >|?|< x==present]: expected field or quoted"),
        ("name==|bar|", "[name== >|||< bar|]: invalid quote encountered"),
        ("name=bar", '[name >|=|< bar]: unsupported operator "="'),
        ("name===bar", '[name >|=|< ==bar]: unsupported operator "==="'),
        ('name=="a\\q"', '[name== >|"|< a\\q"]: illegal escape sequence'),
        ('name=="a\\x1"', '[name== >|"|< a\\x1"]: illegal numeric escape sequence'),
        ("name==", "[name==]: expected value or quoted"),
        ("name==a b", "[name==a >| |< b]: unexpected input:  "),
        ('name"x"==y', '[name >|"|< x"==y]: expected an operator ("=="|"!="|"~=")'),
        ("&", "[ >|&|< ]: expected field or quoted"),
    ],
)
def test_refuses(text: str, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse((text,))
    assert caught.value.message == f"filters: parse error: {message}"


def test_a_filter_of_names_can_be_asked_of_an_index() -> None:
    assert parse(("name==a", "name==b")).names_only("name") == {"a", "b"}
    assert parse(("name==a,labels.x",)).names_only("name") is None
    assert parse(("name~=a",)).names_only("name") is None
    assert ALWAYS.names_only("name") is None


@settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.text(max_size=40))
def test_anything_parses_or_is_an_invalid_argument(text: str) -> None:
    try:
        parsed = parse((text,))
    except InvalidArgument:
        return
    parsed.matches(lambda path: ("x", True))


@settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\n"), max_size=30))
def test_a_quoted_value_is_found_again(value: str) -> None:
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    assert parse((f'name=="{quoted}"',)).matches(lambda path: (value, True))
