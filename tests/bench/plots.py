"""Plots of a run, readable on light and on dark pages: transparent ground, mid-tone words, two colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.measure import Result

OURS, THEIRS, LIMIT, WORDS = "#2a9d5c", "#5b7fd6", "#b58900", "#7d8590"
GROUPS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "pulls": ("pull and unpack (seconds)", ("pull bench/large", "pull bench/many-files", "pull bench/layers")),
    "containers": ("containers (milliseconds)", ("create, start, wait, delete", "command: run --rm true", "exec")),
    "pods": ("pods through CRI (milliseconds)", (
        "RunPodSandbox", "CreateContainer", "StartContainer", "StopContainer", "StopPodSandbox", "RemovePodSandbox")),
    "memory": ("proportional memory (MiB)", (
        "memory of a shim", "memory of a shim where ksmd runs", "memory of the daemon at rest", "memory of the daemon, 100 containers")),
}


def _short(name: str) -> str:
    return name.replace("pull bench/", "").replace("command: ", "").replace("memory of the ", "").replace("memory of a ", "")


def _draw(pyplot: Any, title: str, results: Sequence[Result], path: Path) -> None:
    series = [("this project", "ours", OURS), ("containerd", "theirs", THEIRS), ("tools by hand", "limit", LIMIT)]
    series = [item for item in series if any(result.median(item[1]) is not None for result in results)]
    figure, axes = pyplot.subplots(figsize=(7.2, 0.6 + 0.28 * len(series) * len(results) + 0.12 * len(results)))
    step, height = len(series) + 0.6, 0.9
    for position, (label, who, colour) in enumerate(series):
        middles = [result.median(who) or 0.0 for result in results]
        places = [index * step + position for index in range(len(results))]
        bars = axes.barh(places, middles, height=height, color=colour, label=label)
        for bar, result, middle in zip(bars, results, middles, strict=True):
            values = result.samples.get(who, [])
            if len(values) > 1:
                axes.plot([min(values), max(values)], [bar.get_y() + height / 2] * 2, color=WORDS, linewidth=1)
            if middle:
                axes.annotate(f"{middle:.3g}", (max(values), bar.get_y() + height / 2), xytext=(4, 0),
                              textcoords="offset points", va="center", fontsize=8, color=WORDS)
    axes.set_yticks([index * step + (len(series) - 1) / 2 for index in range(len(results))],
                    [_short(result.row.name) for result in results])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title(title, loc="left", fontsize=10, color=WORDS)
    axes.legend(loc="lower right", fontsize=8, frameon=False, labelcolor=WORDS)
    axes.tick_params(colors=WORDS, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(WORDS)
    figure.tight_layout()
    figure.savefig(path, transparent=True, metadata={"Date": None})
    pyplot.close(figure)


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw a plot for each group that has samples of both daemons; the files written."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "bench"
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    by_name = {result.row.name: result for result in results}
    written = []
    for name, (title, rows) in GROUPS.items():
        known = [by_name[row] for row in rows if row in by_name and by_name[row].ratio is not None]
        if known:
            path = folder / f"bench-{name}.svg"
            _draw(pyplot, title, known, path)
            written.append(path)
    return written
