"""What a pull shows: bars on a terminal, however narrow, and lines elsewhere."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import pytest
from pctr.light import Descriptor
from pctr.light_transfer import Progress
from pctr.progress import display

IMAGE = "registry.example.test/a-team/an-image-with-a-long-name:2.4.39-4"
LAYER = "layer-sha256:" + "ab" * 32


class Terminal(io.StringIO):
    """Text that was written to a terminal."""

    def isatty(self) -> bool:
        return True


def reports() -> Iterator[Progress]:
    """A pull of one layer."""
    yield Progress(event=f"Pulling from OCI Registry ({IMAGE})")
    yield Progress(event="fetching image content", name=IMAGE)
    yield Progress(event="waiting", name=LAYER, desc=Descriptor(size=4 << 20))
    for done in (1 << 20, 3 << 20):
        yield Progress(event="downloading", name=LAYER, progress=done, total=4 << 20)
    yield Progress(event="extracted", name=LAYER, desc=Descriptor(size=4 << 20))
    yield Progress(event=f"Completed pull from OCI Registry ({IMAGE})")


def shown(stream: io.StringIO, *, quiet: bool = False) -> str:
    """All that was written while the reports came, without what moves the cursor."""
    with display(quiet, stream) as sink:
        for report in reports():
            sink.update(report)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_a_bar_has_room_on_a_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    text = shown(Terminal())
    *_, last = (line for line in re.split(r"[\r\n]", text) if line.startswith("layer abababababab"))
    assert len(last) == columns
    assert last.count("━") >= 4
    assert "4.0/4.0 MiB" in last
    assert last.rstrip().endswith("extracted")
    for line in (f"Pulling from OCI Registry ({IMAGE})", f"{IMAGE}: fetching image content"):
        assert text.count(line) == 1, "said once, and in full"


def test_elsewhere_there_is_a_line_for_each_change() -> None:
    assert shown(io.StringIO()).splitlines() == [
        f"Pulling from OCI Registry ({IMAGE})", f"{IMAGE}: fetching image content",
        "layer-sha256:abababababab: waiting  4.0 MiB", "layer-sha256:abababababab: downloading  4.0 MiB",
        "layer-sha256:abababababab: extracted  4.0 MiB", f"Completed pull from OCI Registry ({IMAGE})",
    ]


def test_quiet_is_quiet() -> None:
    assert shown(Terminal(), quiet=True) == ""
