"""Progress of a pull or push: a bar for each blob on a terminal, a line for each elsewhere."""

from __future__ import annotations

import sys

from pctr.output import human_size, plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Protocol, Self, TextIO

    from rich.progress import TaskID

    from pctr.light_transfer import Progress as Report

    class Display(Protocol):
        """Shows progress for the length of a block."""

        def update(self, progress: Report) -> None:
            """One report."""

        def __enter__(self) -> Self: ...

        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None,
        ) -> None: ...


_DONE = ("complete", "done", "extracted", "unpacked", "already exists", "exists", "saved", "pushed", "uploaded")

#: As wide as "downloading", the longest of the usual ones.
_STATE_WIDTH = 11


def display(quiet: bool, stream: TextIO = sys.stderr) -> Display:
    """The display that fits where the output goes."""
    if quiet:
        return _Silent()
    return _Bars(stream) if stream.isatty() else _Lines(stream)


def short(name: str) -> str:
    """A digest in 12 digits, other names whole."""
    algorithm, colon, digits = name.rpartition(":")
    if colon and len(digits) >= 64:
        return f"{algorithm}:{digits[:12]}"
    return name


class _Silent:
    def update(self, progress: Report) -> None:
        """Nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing."""


class _Lines(_Silent):
    """Prints a line when a part begins and when it is done."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._seen: dict[str, str] = {}

    def update(self, progress: Report) -> None:
        """A line whenever the state of a part changes."""
        name = plain(short(progress.name) if progress.name else "")
        state = plain(progress.event)
        if self._seen.get(name) == state:
            return
        self._seen[name] = state
        size = f"  {human_size(progress.size)}" if progress.size and name else ""
        self._stream.write(f"{name + ': ' if name else ''}{state}{size}\n")
        self._stream.flush()


class _Bars(_Silent):
    """Live bars by rich, one for each blob; what is said of the whole is a line above them."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
        from rich.table import Column

        # The bar takes what the others leave; nothing else may grow, or there is no room for it on a narrow terminal.
        self._bars = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            DownloadColumn(binary_units=True, table_column=Column(no_wrap=True, justify="right")),
            TransferSpeedColumn(table_column=Column(no_wrap=True, justify="right")),
            TextColumn("{task.fields[state]}", markup=False, table_column=Column(no_wrap=True, width=_STATE_WIDTH)),
            console=Console(file=stream), expand=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._said = ""

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def update(self, progress: Report) -> None:
        """Move the blob's bar."""
        name, state = plain(short(progress.name)), plain(progress.event)
        if ":" not in name or "/" in name:
            said = f"{name}: {state}" if name else state
            if said != self._said:
                self._bars.console.print(said, markup=False, highlight=False, soft_wrap=True)
            self._said = said
            return
        if name not in self._tasks:
            shown = name.replace("-sha256:", " ")
            self._tasks[name] = self._bars.add_task(shown, total=progress.size or None, state=state)
        finished = state.lower() in _DONE
        completed = progress.size if finished and progress.size else progress.progress
        self._bars.update(self._tasks[name], total=progress.size or None, completed=completed or 0, state=state)
