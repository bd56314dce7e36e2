"""What a measurement is, and the loop that takes it from both daemons in turn."""

from __future__ import annotations

import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.images import BuiltImage
from tests.bench.subjects import Subject

LIMIT_ROUNDS = 3
"""Samples of the machine's own limit: it varies less and some of it takes as long as a daemon's round."""

Values = dict[str, float]
"""Row name → value, lower is better, in the unit of the row."""


@dataclass
class Session:
    """What every measurement may use: folder, images, daemons."""

    work: Path
    registry: str
    images: dict[str, BuiltImage]
    subjects: list[Subject]

    def reference(self, name: str) -> str:
        """Full reference of an image of ours."""
        return f"{self.registry}/{name}:latest"


@dataclass(frozen=True)
class Row:
    """One line of the table. `goal` is the most that the ratio to containerd should be, where we set one."""

    name: str
    unit: str
    goal: float | None = None


class Case:
    """One measurement; it may yield several rows.

    `ready` and `done` run once for each daemon, outside the measured time; `measure` runs in
    every round; `limit` gives what the machine itself can do, for the rows where that is known.
    """

    name = ""
    text = ""
    rows: tuple[Row, ...] = ()
    warm_up = True
    most_rounds = 100

    def ready(self, session: Session, subject: Subject) -> None:
        """Prepare the daemon."""

    def measure(self, session: Session, subject: Subject) -> Values:
        """One round on one daemon."""
        raise NotImplementedError

    def done(self, session: Session, subject: Subject) -> None:
        """Leave the daemon as it was before."""

    def limit(self, session: Session) -> Values:
        """One round of the machine's own limit; empty where none is known."""
        return {}


@dataclass
class Result:
    """All samples of one row."""

    row: Row
    samples: dict[str, list[float]] = field(default_factory=dict)

    def median(self, who: str) -> float | None:
        """Median of the samples of "ours", "theirs" or "limit"; None without samples."""
        values = self.samples.get(who)
        return statistics.median(values) if values else None

    def spread(self, who: str) -> float:
        """Half the distance between the quartiles, as a part of the median; 0 for fewer than two samples."""
        values = self.samples.get(who, [])
        middle = self.median(who)
        if len(values) < 2 or not middle:
            return 0.0
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return (high - low) / 2 / middle

    @property
    def ratio(self) -> float | None:
        """Ours to theirs."""
        ours, theirs = self.median("ours"), self.median("theirs")
        return ours / theirs if ours is not None and theirs else None


def say(text: str) -> None:
    """A line for who watches."""
    print(text, file=sys.stderr, flush=True)


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def run_case(case: Case, session: Session, rounds: int, failures: list[str]) -> list[Result]:
    """Take `rounds` samples of each daemon in turn, after a round that does not count."""
    results = {row.name: Result(row) for row in case.rows}
    active: list[Subject] = []
    for subject in session.subjects:
        try:
            case.ready(session, subject)
            active.append(subject)
        except Exception as error:
            _failed(case, subject.name, "preparation", error, failures)
            _finish(case, session, subject, failures)
    count, limited = min(rounds, case.most_rounds), True
    for number in range(-1 if case.warm_up else 0, count):
        order = active if number % 2 == 0 else list(reversed(active))
        for subject in list(order):
            try:
                values = case.measure(session, subject)
            except Exception as error:
                _failed(case, subject.name, f"round {number + 1}", error, failures)
                active.remove(subject)
                _finish(case, session, subject, failures)
                continue
            _add(results, subject.name, values, number)
        try:
            _add(results, "limit", case.limit(session) if limited and number < LIMIT_ROUNDS else {}, number)
        except Exception as error:
            limited = False
            _failed(case, "limit", f"round {number + 1}", error, failures)
    for subject in active:
        _finish(case, session, subject, failures)
    return list(results.values())


def _add(results: dict[str, Result], who: str, values: Values, number: int) -> None:
    for name, value in values.items():
        if number >= 0:
            results[name].samples.setdefault(who, []).append(value)


def _finish(case: Case, session: Session, subject: Subject, failures: list[str]) -> None:
    try:
        case.done(session, subject)
    except Exception as error:
        _failed(case, subject.name, "clean-up", error, failures)


def _failed(case: Case, who: str, stage: str, error: Exception, failures: list[str]) -> None:
    text = f"{case.name}: {who}: {stage}: {_words(error)}"
    failures.append(text)
    say(f"  FAILED {text}")
    if os.environ.get("BENCH_DEBUG"):
        say("".join(traceback.format_exception(error, limit=-4)))


def _words(error: Exception) -> str:
    details = getattr(error, "details", None)
    if callable(details):
        return f"{getattr(error, 'code', lambda: '')()} {details()}"
    errors = getattr(error, "stderr", None)
    tail = errors[-400:].decode(errors="replace") if isinstance(errors, bytes) else ""
    return f"{type(error).__name__}: {error} {tail}".strip()


def pick(cases: Sequence[Case], only: Sequence[str]) -> list[Case]:
    """The cases whose name is in `only`, or starts with an entry and a dash; all when it is empty."""
    chosen = [case for case in cases if not only or any(case.name == word or case.name.startswith(f"{word}-")
                                                        for word in only)]
    unknown = [word for word in only if not any(case.name == word or case.name.startswith(f"{word}-") for case in cases)]
    if unknown:
        raise SystemExit(f"no measurement named {', '.join(unknown)}; --list shows them")
    return chosen
