"""Table, JSON and text of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.measure import Result


def number(value: float | None) -> str:
    """Three significant digits, or a dash."""
    if value is None:
        return "–"
    if value >= 100:
        return f"{value:.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _cell(result: Result, who: str) -> str:
    text = number(result.median(who))
    return f"{text} ±{result.spread(who) * 100:.0f}%" if len(result.samples.get(who, [])) > 1 else text


def _verdict(result: Result) -> str:
    if result.row.goal is None:
        return ""
    text = f"≤ {result.row.goal:g}"
    if result.ratio is None:
        return text
    return f"{text} {'yes' if result.ratio <= result.row.goal else 'NO'}"


def rows_of(results: Sequence[Result]) -> list[list[str]]:
    """Cells of the table, its head first."""
    rows = [["measurement", "unit", "ours", "containerd", "ratio", "goal", "limit"]]
    for result in results:
        rows.append([result.row.name, result.row.unit, _cell(result, "ours"), _cell(result, "theirs"),
                     number(result.ratio), _verdict(result), _cell(result, "limit")])
    return rows


def table(results: Sequence[Result]) -> str:
    """The results as aligned text: median, half the distance of the quartiles, ratio, goal and limit."""
    rows = rows_of(results)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for position, row in enumerate(rows):
        cells = [row[0].ljust(widths[0]), row[1].ljust(widths[1])]
        cells += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(cells).rstrip())
        if position == 0:
            lines.append("-" * len(lines[0]))
    return "\n".join(lines)


def markdown(results: Sequence[Result], machine: Mapping[str, str], rounds: int) -> str:
    """The same as Markdown, with the machine."""
    rows = rows_of(results)
    lines = [f"Medians of {rounds} rounds; ± is half the distance between the quartiles.", ""]
    lines += ["| " + " | ".join(rows[0]) + " |", "| --- | --- |" + " ---: |" * (len(rows[0]) - 2)]
    lines += ["| " + " | ".join(row) + " |" for row in rows[1:]]
    lines += ["", *(f"- {name}: {value}" for name, value in machine.items())]
    return "\n".join(lines) + "\n"


def summary(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Medians and ratio of every row that has a sample of ours."""
    found = []
    for result in results:
        if result.median("ours") is not None:
            found.append({"name": result.row.name, "ours": result.median("ours"), "theirs": result.median("theirs"),
                          "ratio": result.ratio, "unit": result.row.unit})
    return found


def details(results: Sequence[Result], machine: Mapping[str, str], failures: Sequence[str]) -> dict[str, Any]:
    """Everything: the machine, every sample, every failure."""
    rows = [{"name": result.row.name, "unit": result.row.unit, "goal": result.row.goal, "ratio": result.ratio,
             "samples": result.samples} for result in results]
    return {"machine": dict(machine), "results": rows, "failures": list(failures)}


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as JSON."""
    Path(path).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
