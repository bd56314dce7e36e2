"""Containers over gRPC and by command: one, an exec, fifty at once; and plain runc beside them."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import subprocess
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.bench import spec
from tests.bench.measure import Case, Row, Session, Values, timed
from tests.bench.subjects import Subject

SPACE = "bench"
SLEEP = ["sleep", "1000000"]
TIMES = 5
MANY = 50


class Tasks(Case):
    """Shared preparation: the small image is present in the namespace."""

    _numbers = itertools.count()

    def __init__(self) -> None:
        self.chains: dict[str, str] = {}

    def ready(self, session: Session, subject: Subject) -> None:
        self.chains[subject.name] = have_image(session, subject)

    def done(self, session: Session, subject: Subject) -> None:
        subject.client.purge(SPACE)

    def new_name(self, subject: Subject, word: str) -> str:
        """An id that was not used before, by either daemon or another run: they may share their runtime's folder."""
        return f"{word}-{subject.tag}-{next(self._numbers)}"


def have_image(session: Session, subject: Subject) -> str:
    """Import the small image once for each daemon; its chain ID."""
    known: dict[str, str] = session.__dict__.setdefault("chains", {})
    if subject.name not in known:
        image = session.images["bench/busybox"]
        known[subject.name] = subject.client.import_image(SPACE, image, session.reference("bench/busybox"))
    return known[subject.name]


class Lifecycle(Tasks):
    """Create, start, wait and delete of a container that runs `true`."""

    name = "lifecycle"
    text = "prepare, create, start, wait and delete of a container that runs `true`, over gRPC, each step and all"
    total = "create, start, wait, delete"
    rows = (Row(total, "ms", 0.8), Row("container create", "ms"), Row("container start", "ms"),
            Row("container exit", "ms"), Row("container delete", "ms"))

    def measure(self, session: Session, subject: Subject) -> Values:
        taken = [self._one(subject) for _ in range(TIMES)]
        return {name: statistics.median(item[name] for item in taken) for name in taken[0]}

    def _one(self, subject: Subject) -> Values:
        client, name = subject.client, self.new_name(subject, "life")
        marks = [time.perf_counter()]
        client.create(SPACE, name, self.chains[subject.name], ["true"], subject.cgroup)
        marks.append(time.perf_counter())
        ended = client.wait(SPACE, name)
        client.start(SPACE, name)
        marks.append(time.perf_counter())
        status = ended.result(60).exit_status
        marks.append(time.perf_counter())
        client.delete_task(SPACE, name)
        client.delete_record(SPACE, name)
        marks.append(time.perf_counter())
        if status != 0:
            raise RuntimeError(f"{name} ended with {status}")
        steps = [(after - before) * 1000 for before, after in itertools.pairwise(marks)]
        return dict(zip([row.name for row in self.rows], [sum(steps), *steps], strict=True))

    def limit(self, session: Session) -> Values:
        with Bundle(session) as bundle:
            return {self.total: statistics.median(bundle.run() for _ in range(3)) * 1000}


class Exec(Tasks):
    """An exec of `true` in a running container."""

    name = "exec"
    text = "exec of `true` in a running container, to its deletion, over gRPC"
    rows = (Row("exec", "ms", 1.0),)

    def ready(self, session: Session, subject: Subject) -> None:
        super().ready(session, subject)
        client = subject.client
        client.create(SPACE, f"exec-{subject.tag}", self.chains[subject.name], SLEEP, subject.cgroup)
        client.start(SPACE, f"exec-{subject.tag}")

    def measure(self, session: Session, subject: Subject) -> Values:
        taken = []
        for _ in range(TIMES):
            name = self.new_name(subject, "exec")
            taken.append(timed(lambda name=name: subject.client.exec(SPACE, f"exec-{subject.tag}", name, ["true"])))  # type: ignore[misc]
        return {"exec": statistics.median(taken) * 1000}


class Parallel(Tasks):
    """Fifty containers at once."""

    name = "parallel"
    text = f"{MANY} containers created and started at once, until the last one runs; and their removal"
    rows = (Row(f"{MANY} containers in parallel", "s", 0.8), Row(f"removal of {MANY} containers in parallel", "s"))

    def measure(self, session: Session, subject: Subject) -> Values:
        client, chain = subject.client, self.chains[subject.name]
        names = [self.new_name(subject, "many") for _ in range(MANY)]

        def bring_up(name: str) -> None:
            client.create(SPACE, name, chain, SLEEP, subject.cgroup)
            client.start(SPACE, name)

        with ThreadPoolExecutor(max_workers=MANY) as pool:
            up = timed(lambda: list(pool.map(bring_up, names)))
            if (running := len(client.task_pids(SPACE))) != MANY:
                raise RuntimeError(f"{running} of {MANY} containers run")
            down = timed(lambda: list(pool.map(lambda name: client.delete(SPACE, name), names)))
        return {self.rows[0].name: up, self.rows[1].name: down}


class RunCommand(Tasks):
    """`run --rm` of `true` from the command line, and plain `runc run`."""

    name = "run"
    text = "pctr run --rm and ctr run --rm of `true` as whole processes; the limit is plain `runc run` of what pctr runs"
    rows = (Row("command: run --rm true", "ms", 1.0),)

    def measure(self, session: Session, subject: Subject) -> Values:
        taken = []
        for _ in range(TIMES):
            words = ("run", "--rm", session.reference("bench/busybox"), self.new_name(subject, "run"), "true")
            taken.append(timed(lambda words=words: subject.run("--namespace", SPACE, *words)))  # type: ignore[misc]
        return {self.rows[0].name: statistics.median(taken) * 1000}

    def limit(self, session: Session) -> Values:
        ours = next(subject for subject in session.subjects if subject.name == "ours")
        made: dict[str, Any] = json.loads(subprocess.run(
            [*ours.cli, "oci", "spec", "true"], check=True, capture_output=True).stdout)
        with Bundle(session, made) as bundle:
            return {self.rows[0].name: statistics.median(bundle.run() for _ in range(TIMES)) * 1000}


class Bundle:
    """A bundle on an overlay mount, for plain runc: what the runtime alone takes for the same config.json.

    `config` is the one to use, the benchmark's own by default; its root and its cgroup are set here.
    """

    def __init__(self, session: Session, config: dict[str, Any] | None = None) -> None:
        self._session = session
        self.folder = session.work / "runc"
        self._cgroup = f"/{session.work.name}-runc"
        self._config = config or json.loads(spec.container(["true"], ""))
        self._config["root"] = {"path": "rootfs"}
        self._config["linux"]["cgroupsPath"] = f"{self._cgroup}/true"

    def __enter__(self) -> Bundle:
        layer = self.folder / "lower"
        if not layer.exists():
            layer.mkdir(parents=True)
            with tarfile.open(self._session.images["bench/busybox"].layers[0].path) as tar:
                tar.extractall(layer, filter="fully_trusted")
            for name in ("upper", "work", "rootfs"):
                (self.folder / name).mkdir()
            (self.folder / "config.json").write_text(json.dumps(self._config))
        options = f"lowerdir={layer},upperdir={self.folder / 'upper'},workdir={self.folder / 'work'}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(self.folder / "rootfs")], check=True)
        return self

    def run(self) -> float:
        """Seconds of one `runc run`."""
        command = ["runc", "--root", str(self.folder / "state"), "run", "--bundle", str(self.folder), f"true-{os.getpid()}"]
        return timed(lambda: subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True))

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", str(self.folder / "rootfs")], check=True)
        shutil.rmtree(self.folder)
        for top in Path("/sys/fs/cgroup").iterdir():
            path = top / self._cgroup.strip("/")
            if path.is_dir():
                path.rmdir()


def cases() -> list[Case]:
    """All of this module."""
    return [Lifecycle(), RunCommand(), Exec(), Parallel()]


