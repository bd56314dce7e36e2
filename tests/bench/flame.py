"""Flame graphs of our daemon and its helpers, from stacks that py-spy samples while a measurement runs.

py-spy is not needed for anything else: where it is not installed, there are no flame graphs.
"""

from __future__ import annotations

import colorsys
import html
import re
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

RATE = 400
WIDTH, HEIGHT, SMALLEST = 1200.0, 17, 1.2
IDLE = ("(selectors.py", "(concurrent/futures/thread.py:81)", "_do_waitpid", "(threading.py", "Engine._run",
        "GrowingFile._packet", "Zygote.run", "(queue.py", "pctr-unpack", "recv_fds")
"""What a thread's innermost frame shows when it waits; such samples are left out."""


FRAME = re.compile(r".+ \(.+:\d+\)")
PROCESSES = {"diff.worker": "unpack worker", "pctr_shim": "zygote and shims"}
"""What a process's stacks contain, and what it is called in the graph; the daemon's contain none of it."""


@dataclass
class Frame:
    """A function at one place of the stacks, with the samples at or below it."""

    name: str
    count: int = 0
    below: dict[str, Frame] = field(default_factory=dict)

    def depth(self) -> int:
        """Height of the tree."""
        return 1 + max((item.depth() for item in self.below.values()), default=0)


def short(name: str) -> str:
    """A frame without its line, its path cut to package and module."""
    words, _, place = name.rpartition(" (")
    path = place.partition(":")[0].rstrip(")")
    for mark in ("site-packages/", "lib/python3"):
        path = path.rpartition(mark)[2]
    return f"{words} ({path})" if words else name


def tree(lines: Iterable[str]) -> Frame:
    """The stacks of `py-spy --format raw` (frames joined by semicolons, a count at the end) as one tree."""
    root = Frame("all")
    for line in lines:
        stack, _, number = line.rstrip().rpartition(" ")
        frames = [item for item in stack.split(";") if FRAME.fullmatch(item)]
        if not number.isdigit() or not frames or any(mark in frames[-1] for mark in IDLE):
            continue
        frames.insert(0, next((name for mark, name in PROCESSES.items() if mark in stack), "daemon"))
        place = root
        place.count += int(number)
        for item in frames:
            place = place.below.setdefault(short(item), Frame(short(item)))
            place.count += int(number)
    return root


def _colour(name: str) -> str:
    """Ours green, the standard library blue, others orange; shades by name."""
    shade = zlib.crc32(name.encode()) % 24 / 100
    if "supervisord_ctr" in name or "pctr" in name:
        hue, light, strength = 0.40, 0.42 + shade, 0.45
    elif "site-packages" in name or "/" in name.rpartition("(")[2]:
        hue, light, strength = 0.60, 0.52 + shade, 0.45
    else:
        hue, light, strength = 0.10, 0.50 + shade, 0.60
    red, green, blue = (round(value * 255) for value in colorsys.hls_to_rgb(hue, light, strength))
    return f"#{red:02x}{green:02x}{blue:02x}"


def render(root: Frame, title: str) -> str:
    """The tree as SVG, root at the bottom; widths are samples."""
    depth = root.depth()
    top = 28 + depth * HEIGHT
    parts = [(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {top + 6}" '
              'font-family="monospace" font-size="11">'),
             f'<text x="4" y="16" font-size="14" fill="#7d8590">{html.escape(title)}</text>']

    def draw(item: Frame, left: float, level: int) -> None:
        width = item.count / root.count * WIDTH
        if width < SMALLEST:
            return
        y = top - (level + 1) * HEIGHT
        share = f"{item.count / root.count * 100:.1f}%"
        label = html.escape(item.name)
        parts.append(f'<g><title>{label}: {share}</title><rect x="{left:.1f}" y="{y}" width="{width - 0.4:.1f}" '
                     f'height="{HEIGHT - 1}" rx="1.5" fill="{_colour(item.name)}"/>')
        if (room := int((width - 6) / 6.7)) > 3:
            text = item.name if len(item.name) <= room else item.name[:room - 1] + "…"
            parts.append(f'<text x="{left + 3:.1f}" y="{y + 12}" fill="#111">{html.escape(text)}</text>')
        parts.append("</g>")
        for child in sorted(item.below.values(), key=lambda other: other.name):
            draw(child, left, level + 1)
            left += child.count / root.count * WIDTH

    if root.count:
        draw(root, 0.0, 0)
    return "\n".join([*parts, "</svg>", ""])


def record(pids: Mapping[int, str], work: Callable[[], object], folder: Path) -> list[str]:
    """Sample the processes while `work` runs; raw stacks of all of them."""
    program = shutil.which("py-spy")
    if program is None:
        raise RuntimeError("py-spy is not installed")
    runs = []
    for pid, name in pids.items():
        target = folder / f"{pid}.stacks"
        command = [program, "record", "--rate", str(RATE), "--format", "raw", "--duration", "600", "--subprocesses",
                   "--nonblocking", "--output", str(target), "--pid", str(pid)]
        runs.append((subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), target, name))
    work()
    lines: list[str] = []
    for process, target, _ in runs:
        process.send_signal(signal.SIGINT)
        process.wait(60)
        if target.exists():
            lines += target.read_text(encoding="utf-8").splitlines()
            target.unlink()
    return lines


def main() -> None:
    """`python -m tests.bench.flame TITLE < STACKS > FILE.svg`."""
    sys.stdout.write(render(tree(sys.stdin), sys.argv[1]))


if __name__ == "__main__":
    main()
