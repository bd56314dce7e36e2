"""Tables, JSON, sizes, ages; and the small parsers of options."""

from __future__ import annotations

import json
import signal
from types import SimpleNamespace

import pytest
from pctr import output
from pctr.command import Context, UsageError, parse_duration, parse_labels, parse_size
from pctr.commands.snapshot import draw_tree
from pctr.pod_logs import Line, parse_lines
from pctr.signals import parse_signal
from pctr.task_metrics import flatten


def _table() -> output.Table:
    table = output.Table("TASK", "CREATED AT", "SIZE", "LABELS", right=("SIZE",))
    table.add("web", output.Cell(None, "-"), output.size(1536), output.labels([("b", "2"), ("a", "1")]))
    table.add("a-longer-one", output.Cell("2026-01-02T03:04:05Z", "1 day ago"), output.size(0), output.labels([]))
    return table


def test_columns_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    _table().show(SimpleNamespace(format="table"))
    assert capsys.readouterr().out.splitlines() == [
        "TASK            CREATED AT       SIZE    LABELS",
        "web             -             1.5 KiB    a=1,b=2",
        "a-longer-one    1 day ago         0 B    -",
    ]


def test_json_is_one_list_with_columns_in_lower_case_and_raw_values(capsys: pytest.CaptureFixture[str]) -> None:
    _table().show(SimpleNamespace(format="json"))
    assert json.loads(capsys.readouterr().out) == [
        {"task": "web", "created_at": None, "size": 1536, "labels": {"a": "1", "b": "2"}},
        {"task": "a-longer-one", "created_at": "2026-01-02T03:04:05Z", "size": 0, "labels": {}},
    ]


def test_quiet_prints_one_column(capsys: pytest.CaptureFixture[str]) -> None:
    _table().show(SimpleNamespace(format="table", quiet=True))
    assert capsys.readouterr().out == "web\na-longer-one\n"


def test_an_empty_list_is_a_header_or_an_empty_list(capsys: pytest.CaptureFixture[str]) -> None:
    output.Table("TASK", "PID").show(SimpleNamespace(format="table"))
    output.Table("TASK", "PID").show(SimpleNamespace(format="json"))
    assert capsys.readouterr().out == "TASK    PID\n[]\n"


def test_s10_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    table = output.Table("NAME")
    table.add("evil\x1b[2J\nname")
    table.show(SimpleNamespace(format="table"))
    assert "\x1b" not in capsys.readouterr().out
    output.warn("bad\x1bthing")
    assert capsys.readouterr().err == "pctr: bad?thing\n"


@pytest.mark.parametrize(("count", "text"), [
    (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 20, "5.0 MiB"), (3 << 40, "3.0 TiB"), (9 << 50, "9216.0 TiB"),
])
def test_sizes(count: int, text: str) -> None:
    assert output.human_size(count) == text


@pytest.mark.parametrize(("seconds", "text"), [
    (-5, "0 seconds"), (1, "1 second"), (119, "1 minute"), (7200, "2 hours"), (86400 * 3, "3 days"), (1e9, "31 years"),
])
def test_spans(seconds: float, text: str) -> None:
    assert output.human_span(seconds) == text


def test_times() -> None:
    assert output.rfc3339(1_700_000_000, 120_000_000) == "2023-11-14T22:13:20.12Z"
    assert output.rfc3339(0) == ""


@pytest.mark.parametrize(("text", "size"), [
    ("512", 512), ("64k", 65536), ("64KiB", 65536), ("1.5g", 3 << 29), ("2GB", 2 << 30), ("7b", 7),
])
def test_size_options(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "g", "1x", "-5", "1 2"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("1m30s", 90), ("500ms", 0.5), ("2d", 172800)])
def test_span_options(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


def test_span_options_that_are_none() -> None:
    for text in ("s", "5x", "m5"):
        with pytest.raises(UsageError):
            parse_duration(text)


def test_labels() -> None:
    assert parse_labels(["a=b=c", "d", "e="]) == {"a": "b=c", "d": "", "e": ""}
    with pytest.raises(UsageError):
        parse_labels(["=x"])


@pytest.mark.parametrize(("text", "number"), [
    ("9", 9), ("KILL", 9), ("sigterm", 15), ("RTMIN+3", int(signal.SIGRTMIN) + 3), ("SIGHUP", 1),
])
def test_signals(text: str, number: int) -> None:
    assert parse_signal(text) == number


@pytest.mark.parametrize("text", ["", "0", "99", "NOPE", "KILL+x"])
def test_signals_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse_signal(text)


def test_settings_come_from_the_option_then_our_variables_then_containerds() -> None:
    nothing = SimpleNamespace(address=None, namespace=None)
    assert Context(nothing, {}).address == "/run/supervisord-ctr/supervisord-ctr.sock"
    assert Context(nothing, {}).namespace == "default"
    theirs = {"CONTAINERD_ADDRESS": "/c.sock", "CONTAINERD_NAMESPACE": "c"}
    assert Context(nothing, theirs).address == "/c.sock"
    both = {**theirs, "PCTR_ADDRESS": "/p.sock", "PCTR_NAMESPACE": "p"}
    assert (Context(nothing, both).address, Context(nothing, both).namespace) == ("/p.sock", "p")
    assert Context(SimpleNamespace(address="/o.sock", namespace="o"), both).address == "/o.sock"


def test_a_tree_of_snapshots() -> None:
    assert draw_tree({"base": "", "one": "base", "two": "base", "deep": "one", "lost": "gone"}) == [
        "base", "├── one", "│   └── deep", "└── two", "lost",
    ]


def test_metrics_are_flattened() -> None:
    assert flatten({"a": {"b": 1, "c": [1, 2]}, "d": [{"e": 3}]}) == {"a.b": 1, "a.c": "1 2", "d.0.e": 3}


def test_p19_partial_lines_of_a_log_are_joined_by_stream() -> None:
    raw = [
        b"2026-01-01T00:00:00.1Z stdout P one \n", b"2026-01-01T00:00:00.2Z stderr F err\n",
        b"2026-01-01T00:00:00.3Z stdout F two\n", b"garbage\n", b"2026-01-01T00:00:00.4Z stdout F\n",
    ]
    assert list(parse_lines(raw)) == [
        Line("2026-01-01T00:00:00.2Z", "stderr", b"err\n"), Line("2026-01-01T00:00:00.3Z", "stdout", b"one two\n"),
        Line("2026-01-01T00:00:00.4Z", "stdout", b"\n"),
    ]
