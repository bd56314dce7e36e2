"""`pctr pod logs`: reading log files in CRI's format, also while they are rotated."""

from __future__ import annotations

import collections
import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import BinaryIO, NamedTuple

from pctr import pods
from pctr.command import Context, Failed
from supervisord_ctr.api.cri.v1 import cri_pb2


class Line(NamedTuple):
    """A whole line: when, on which stream, and its bytes with the line's end if it had one."""

    time: str
    stream: str
    data: bytes


def parse_lines(raw: Iterable[bytes]) -> Iterator[Line]:
    """Lines of `TIME STREAM P|F TEXT`; partial pieces are joined. What is not in the format is left out."""
    pending: dict[str, list[bytes]] = {}
    for entry in raw:
        parts = entry.rstrip(b"\n").split(b" ", 3)
        if len(parts) < 3 or parts[1] not in (b"stdout", b"stderr"):
            continue
        stream, text = parts[1].decode(), parts[3] if len(parts) == 4 else b""
        tags = parts[2].split(b":")
        pieces = pending.setdefault(stream, [])
        pieces.append(text)
        if b"P" not in tags:
            yield Line(parts[0].decode(errors="replace"), stream, b"".join(pieces) + b"\n")
            pending[stream] = []


def _seconds(stamp: str) -> float:
    """Seconds since the epoch of an RFC 3339 time with nanoseconds; 0 for what is none."""
    head, dot, rest = stamp.partition(".")
    try:
        if dot:
            digits = rest.rstrip("Z").partition("+")[0].partition("-")[0]
            zone = rest[len(digits):].replace("Z", "+00:00")
            return datetime.fromisoformat(f"{head}.{digits[:6].ljust(6, '0')}{zone}").timestamp()
        return datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return 0.0


def _show(line: Line, timestamps: bool) -> None:
    target: BinaryIO = sys.stdout.buffer if line.stream == "stdout" else sys.stderr.buffer
    target.write((f"{line.time} ".encode() if timestamps else b"") + line.data)
    target.flush()


def show_logs(context: Context, since: float) -> None:
    """Print the log of the container, and follow it when asked."""
    args, client = context.args, context.client
    found = pods.find_container(client, args.container)
    path = pods.container_status(client, found.id).status.log_path
    if not path:
        raise Failed(f"container {args.container}: has no log file")
    with open(path, "rb") as file:
        lines: Iterator[Line] = (line for line in parse_lines(file) if not since or _seconds(line.time) >= since)
        if args.tail >= 0:
            lines = iter(collections.deque(lines, maxlen=args.tail)) if args.tail else iter(())
        for line in lines:
            _show(line, args.timestamps)
        if args.follow:
            file.seek(0, os.SEEK_END)
            for line in parse_lines(_follow(context, file, path, found.id)):
                _show(line, args.timestamps)


def _running(context: Context, container: str) -> bool:
    status = pods.container_status(context.client, container).status
    return status.state in (cri_pb2.CONTAINER_RUNNING, cri_pb2.CONTAINER_CREATED)


def _follow(context: Context, file: BinaryIO, path: str, container: str) -> Iterator[bytes]:
    """Lines as they are written, on over a rotation, until the container has ended and all is read."""
    rest = b""
    with contextlib.ExitStack() as stack:
        while True:
            # Asked before reading: what was written before the end is then never missed.
            running = _running(context, container)
            while piece := file.readline():
                rest += piece
                if rest.endswith(b"\n"):
                    yield rest
                    rest = b""
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino != os.fstat(file.fileno()).st_ino:
                    file = stack.enter_context(open(path, "rb"))
                    continue
            if not running:
                return
            context.client.connection.pump(0.3)
