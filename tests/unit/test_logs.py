"""Log lines."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from supervisord_ctr import logs


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_s10_a_message_cannot_start_a_line_of_its_own() -> None:
    stream = io.StringIO()
    logs.configure("info", "text", stream)
    logging.getLogger("supervisord_ctr.x").info("hello\nlevel=error msg=forged", extra={"id": "a b"})
    (line,) = stream.getvalue().splitlines()
    assert r'msg="hello\nlevel=error msg=forged"' in line
    assert 'id="a b"' in line
    assert "logger=x" in line


def test_json_lines_carry_fields_and_tracebacks() -> None:
    stream = io.StringIO()
    logs.configure("debug", "json", stream)
    try:
        raise ValueError("bad")
    except ValueError:
        logging.getLogger("y").exception("failed", extra={"pid": 7})
    row = json.loads(stream.getvalue())
    assert (row["level"], row["msg"], row["pid"]) == ("error", "failed", 7)
    assert "ValueError: bad" in row["traceback"]


def test_levels_are_honoured() -> None:
    stream = io.StringIO()
    logs.configure("warning", "text", stream)
    logging.getLogger("z").info("quiet")
    assert stream.getvalue() == ""
