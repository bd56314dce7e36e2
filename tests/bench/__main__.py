"""Command line of the benchmark: `python -m tests.bench [--only NAME]... [--rounds N] [--list]`."""

from __future__ import annotations

import argparse
import compileall
import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from tests.bench import disk, flame, kubernetes, machine, plots, report, scale, tasks
from tests.bench.images import Registry, build
from tests.bench.measure import Case, Result, Session, pick, run_case, say
from tests.bench.pulls import Pull, PullCommand
from tests.bench.subjects import Ours, Subject, Theirs, find_containerd

ROOT = Path(__file__).resolve().parents[2]

SAMPLED = 5.0
"""Seconds of rounds that a flame graph is made from."""

PULL_GOALS = {"bench/large": 0.4, "bench/many-files": 0.4, "bench/layers": 0.7}


def all_cases() -> list[Case]:
    """Every measurement, in the order in which they are taken."""
    pulls: list[Case] = []
    for image, goal in PULL_GOALS.items():
        pulls += [Pull(image, goal), PullCommand(image, goal)]
    return [scale.Idle(), *pulls, *tasks.cases(), *kubernetes.cases(), *scale.cases()]


def wanted_images(cases: list[Case]) -> set[str]:
    """Images that the chosen measurements need."""
    return {"bench/busybox", "bench/pause"} | {case.image for case in cases if isinstance(case, Pull | PullCommand)}


def arguments(words: list[str] | None) -> argparse.Namespace:
    """Parsed command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="NAME",
                        help="take only this measurement, or all whose names begin with NAME and a dash; repeatable")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each daemon (default 5)")
    parser.add_argument("--list", action="store_true", help="name the measurements and end")
    parser.add_argument("--plots", metavar="DIR", help="draw plots as SVG files into DIR")
    parser.add_argument("--details", metavar="FILE", help="write machine and every sample as JSON")
    parser.add_argument("--markdown", metavar="FILE", help="write the table as Markdown")
    parser.add_argument("--flames", metavar="DIR", help="draw flame graphs of our daemon into DIR (needs py-spy)")
    parser.add_argument("--work", metavar="DIR", help="parent of the folder for everything (default /var/tmp)")
    parser.add_argument("--ours", action="store_true", help="measure only this project's daemon")
    parser.add_argument("--keep-logs", metavar="DIR", help="copy the logs of both daemons into DIR at the end")
    return parser.parse_args(words)


def measure(options: argparse.Namespace, cases: list[Case], work: Path, failures: list[str]) -> list[Result]:
    """Start registry and daemons, take every measurement, and leave nothing behind."""
    with contextlib.ExitStack() as stack:
        registry = Registry(work / "registry")
        stack.callback(registry.close)
        say("making the images")
        (work / "layers").mkdir()
        images = build(registry.address, work / "layers", wanted_images(cases))
        subjects: list[Subject] = [Ours(work, registry.address, 1)]
        containerd = "" if options.ours else find_containerd()
        if containerd:
            subjects.append(Theirs(work, registry.address, 2, containerd))
        elif not options.ours:
            say("no containerd is installed: this run has nothing to compare with")
        for subject in subjects:
            stack.callback(subject.sweep)
            if options.keep_logs:
                stack.callback(_keep_log, subject, Path(options.keep_logs))
        stack.callback(_no_more_signals)
        for subject in subjects:
            say(f"starting {subject.name}: {' '.join(subject.command())}")
            subject.start()
        session, results = Session(work, registry.address, images, subjects), []
        for number, case in enumerate(cases, 1):
            say(f"[{number}/{len(cases)}] {case.name}: {case.text}")
            taken = run_case(case, session, options.rounds, failures)
            for line in report.table(taken).splitlines()[2:]:
                say(f"    {line}")
            results += taken
            if options.flames:
                _flame(case, session, Path(options.flames), failures)
        return results


def _no_more_signals() -> None:
    """From here on everything is taken away; a second signal must not leave half of it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _keep_log(subject: Subject, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(subject.folder / "log", folder / f"{subject.name}.log")


def _flame(case: Case, session: Session, folder: Path, failures: list[str]) -> None:
    """More rounds on our daemon, sampled for some seconds."""

    def rounds() -> None:
        end = time.monotonic() + SAMPLED
        while time.monotonic() < end:
            case.measure(session, subject)

    subject = session.subjects[0]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        case.ready(session, subject)
        stacks = flame.record({subject.pid: "daemon"}, rounds, session.work)
        (folder / f"flame-{case.name}.svg").write_text(flame.render(flame.tree(stacks), case.text), encoding="utf-8")
    except Exception as error:
        failures.append(f"{case.name}: flame graph: {error}")
    finally:
        case.done(session, subject)


def main(words: list[str] | None = None) -> int:
    """Run the benchmark; 1 when a measurement failed."""
    options = arguments(words)
    cases = pick(all_cases(), options.only)
    if options.list:
        for case in cases:
            print(f"{case.name:28} {case.text}")
        return 0
    if os.geteuid() != 0:
        raise SystemExit("the benchmark starts containers: run it as root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for folder in ("supervisord_ctr", "shim", "cli"):  # as installed: whoever edits need not have written bytecode
        compileall.compile_dir(ROOT / folder, quiet=2)
    failures: list[str] = []
    with disk.working_folder(options.work) as work:
        results = measure(options, cases, work, failures)
        facts = machine.describe(work, "" if options.ours else find_containerd())
    print()
    for name, value in facts.items():
        print(f"{name:11} {value}")
    print(f"{'rounds':11} {options.rounds}, interleaved\n")
    print(report.table(results))
    for text in failures:
        print(f"FAILED {text}")
    if path := os.environ.get("BENCH_JSON"):
        report.write_json(path, report.summary(results))
    if options.details:
        report.write_json(options.details, report.details(results, facts, failures))
    if options.markdown:
        Path(options.markdown).write_text(report.markdown(results, facts, options.rounds), encoding="utf-8")
    if options.plots:
        for written in plots.draw(results, Path(options.plots)):
            say(f"wrote {written}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
