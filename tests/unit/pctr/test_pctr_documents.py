"""`pctr.documents` beside the json package, and what a run must not load."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pctr import documents

_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12,
)


@given(_VALUES)
def test_it_writes_and_reads_as_json_does(value: Any) -> None:
    written = documents.dumps(value)
    assert written == json.dumps(value, separators=(",", ":"))
    assert documents.loads(written.encode()) == value
    assert documents.loads(f" \n{json.dumps(value, indent=2, ensure_ascii=False)}\n".encode()) == value


@pytest.mark.parametrize("data", [
    b"", b" ", b"{", b"[1,]", b'{"a":1} x', b"NaN", b"[Infinity]", b"{'a':1}", b'"\x01"', b"\xff", b"nul", b"01", b'{"a" 1}',
])
def test_what_is_no_json_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        documents.loads(data)


@pytest.mark.parametrize("value", [object(), {"a": {1, 2}}, float("nan")])
def test_what_has_no_form_is_refused(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        documents.dumps(value)


def _loads(program: str) -> list[str]:
    """What a program prints that starts with nothing loaded, not even site."""
    done = subprocess.run([sys.executable, "-S", "-c", "import sys; sys.path[:0] = sys.argv[1].split(':')\n" + program,
                           ":".join(sys.path)], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.split()


def test_a_run_loads_little() -> None:
    """Each of these takes longer than a call; they are easily brought back by an import somewhere."""
    program = (
        "import sys\n"
        "import pctr.__main__, pctr.commands.run, pctr.commands.task, pctr.create, pctr.process, pctr.running\n"
        "from supervisord_ctr.oci import seccomp\n"
        "heavy = ('typing', 're', 'json', 'dataclasses', 'argparse', 'subprocess', 'socket', 'logging', 'asyncio', 'grpc',\n"
        "         'google.protobuf', 'hashlib', 'pathlib', 'inspect', 'collections', 'contextlib', 'enum', 'functools', 'signal',\n"
        "         'types')\n"
        "print(*[name for name in heavy if name in sys.modules])"
    )
    assert _loads(program) == []


def test_a_pull_loads_neither_protobuf_nor_typing() -> None:
    program = (
        "import sys\n"
        "import pctr.__main__, pctr.commands.image, pctr.pulling, pctr.transfer, pctr.progress\n"
        "heavy = ('typing', 're', 'json', 'google.protobuf', 'datetime', 'enum', 'contextlib', 'collections')\n"
        "print(*[name for name in heavy if name in sys.modules])"
    )
    assert _loads(program) == []


def test_the_installed_script_is_ours() -> None:
    installed = Path(sysconfig.get_path("scripts")) / "pctr"
    source = Path(__file__).parents[3] / "cli/bin/pctr"
    assert installed.read_text().splitlines()[1:] == source.read_text().splitlines()[1:]
