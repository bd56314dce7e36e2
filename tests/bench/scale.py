"""What grows with the number of containers: lists, memory, idle processor time, a daemon's start; and content."""

from __future__ import annotations

import hashlib
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from supervisord_ctr.api.cri.v1 import cri_pb2
from supervisord_ctr.api.services.containers.v1 import containers_pb2
from supervisord_ctr.api.services.content.v1 import content_pb2
from tests.bench import merging, processes
from tests.bench.client import meta
from tests.bench.measure import Case, Row, Session, Values, timed
from tests.bench.pods import Pod, remove_all
from tests.bench.subjects import Subject
from tests.bench.tasks import SLEEP, have_image

RECORDS = "bench-records"
DENSE = "bench"
TIMES = 5


class Lists(Case):
    """Native and CRI lists of a number of containers, and the status of one among them."""

    def __init__(self, count: int, *, last: bool) -> None:
        self._count, self._last = count, last
        self.name = f"list-{count}"
        self.text = f"list of {count} containers over both APIs, and the status of one of them"
        self._names = (f"list {count} containers", f"ListContainers of {count}", f"ContainerStatus among {count}")
        goals = (1.5, 3.0, 2.0) if count == 1000 else (None, None, None)
        self.rows = tuple(Row(name, "ms", goal) for name, goal in zip(self._names, goals, strict=True))

    def ready(self, session: Session, subject: Subject) -> None:
        have_image(session, subject)
        kept: dict[str, tuple[Pod, list[str]]] = session.__dict__.setdefault("listed", {})
        client = subject.client
        if subject.name not in kept:
            client.pull(session.reference("bench/busybox"))
            logs = session.work / f"logs-{subject.name}"
            kept[subject.name] = (Pod(client, "listed", logs, subject.cgroup, host_network=True), [])
        pod, made = kept[subject.name]
        missing = range(len(made), self._count)
        image = session.reference("bench/busybox")
        for number in missing:
            client.create_record(RECORDS, f"record-{number}", SLEEP, subject.cgroup, image)
        with ThreadPoolExecutor(max_workers=4) as pool:
            made += pool.map(lambda number: pod.create(f"listed-{number}", image, SLEEP), missing)

    def measure(self, session: Session, subject: Subject) -> Values:
        client = subject.client
        container = session.__dict__["listed"][subject.name][1][self._count // 2]
        calls = (
            lambda: client.containers.List(containers_pb2.ListContainersRequest(), metadata=meta(RECORDS)).containers,
            lambda: client.runtime.ListContainers(cri_pb2.ListContainersRequest(), timeout=120).containers,
            lambda: client.runtime.ContainerStatus(cri_pb2.ContainerStatusRequest(container_id=container), timeout=60),
        )
        for call in calls[:2]:
            if (found := len(call())) != self._count:
                raise RuntimeError(f"{found} containers listed where {self._count} are")
        return {name: statistics.median(timed(call) for _ in range(TIMES)) * 1000
                for name, call in zip(self._names, calls, strict=True)}

    def done(self, session: Session, subject: Subject) -> None:
        if not self._last:
            return
        session.__dict__.get("listed", {}).pop(subject.name, None)
        remove_all(subject.client)
        client = subject.client
        for item in client.containers.List(containers_pb2.ListContainersRequest(), metadata=meta(RECORDS)).containers:
            client.delete_record(RECORDS, item.id, snapshot=False)
        client.remove_image(session.reference("bench/busybox"))
        shutil.rmtree(session.work / f"logs-{subject.name}", ignore_errors=True)


class Idle(Case):
    """Memory of a daemon just started, with its helpers."""

    name = "idle"
    text = "proportional memory of a daemon just started and of its helper processes"
    rows = (Row("memory of the daemon at rest", "MiB"),)
    warm_up = False
    most_rounds = 3

    def measure(self, session: Session, subject: Subject) -> Values:
        subject.stop()
        subject.start()
        time.sleep(2)
        return {self.rows[0].name: processes.proportional_memory(subject.daemon_processes(set()))}


class Density(Case):
    """A hundred containers that sleep, under a daemon just started: memory of shims and daemon, processor time."""

    count = 100
    name = "density"
    text = f"{count} sleeping containers: proportional memory of a shim and of the daemon, and its idle processor time"
    rows = (Row("memory of a shim", "MiB", 0.3), Row(f"memory of the daemon, {count} containers", "MiB", 1.0),
            Row(f"processor time of the daemon, {count} idle containers", "ms/s"))
    warm_up = False
    #: Seconds; longer than a shim waits before it rests that was asked for its task just now.
    window = 8.0

    def ready(self, session: Session, subject: Subject) -> None:
        chain = have_image(session, subject)
        subject.stop()
        subject.start()
        client = subject.client

        def bring_up(number: int) -> None:
            client.create(DENSE, f"dense-{subject.tag}-{number}", chain, SLEEP, subject.cgroup)
            client.start(DENSE, f"dense-{subject.tag}-{number}")

        with ThreadPoolExecutor(max_workers=4) as pool:
            list(pool.map(bring_up, range(self.count)))

    def measure(self, session: Session, subject: Subject) -> Values:
        tasks = subject.client.task_pids(DENSE)
        if len(tasks) != self.count:
            raise RuntimeError(f"{len(tasks)} of {self.count} containers run")
        shims = subject.shims(tasks)
        daemon = subject.daemon_processes(shims)
        before, start = processes.processor_seconds(daemon), time.perf_counter()
        time.sleep(self.window)
        used = (processes.processor_seconds(daemon) - before) / (time.perf_counter() - start)
        values = (processes.proportional_memory(shims) / self.count, processes.proportional_memory(daemon), used * 1000)
        return {row.name: value for row, value in zip(self.rows, values, strict=True)}

    def done(self, session: Session, subject: Subject) -> None:
        subject.client.purge(DENSE)


class MergedDensity(Density):
    """The same where the kernel merges equal pages of memory that is offered to it."""

    name = "density-merged"
    text = f"proportional memory of a shim, {Density.count} of them, once ksmd has merged what is offered to it"
    rows = (Row("memory of a shim where ksmd runs", "MiB", 0.3),)
    most_rounds = 1

    def measure(self, session: Session, subject: Subject) -> Values:
        # Asked before: a shim that answers writes to pages, which are then its own until ksmd comes by again.
        shims = subject.shims(subject.client.task_pids(DENSE))
        with merging.merged():
            return {self.rows[0].name: processes.proportional_memory(shims) / self.count}


class Start(Case):
    """A daemon that starts with a thousand containers on record."""

    count = 1000
    name = "start"
    text = f"start of a daemon with {count} containers on record, until it answers on both APIs"
    rows = (Row(f"start of the daemon, {count} containers on record", "ms"),)

    def ready(self, session: Session, subject: Subject) -> None:
        for number in range(self.count):
            subject.client.create_record("bench-start", f"start-{number}", SLEEP, subject.cgroup)

    def measure(self, session: Session, subject: Subject) -> Values:
        subject.stop()
        return {self.rows[0].name: timed(subject.start) * 1000}

    def done(self, session: Session, subject: Subject) -> None:
        for number in range(self.count):
            subject.client.delete_record("bench-start", f"start-{number}", snapshot=False)


class ContentWrite(Case):
    """A blob written over gRPC in pieces of 1 MiB."""

    size = 256 << 20
    name = "content"
    text = "a blob of 256 MiB written over gRPC in pieces of 1 MiB and committed; the limit writes and hashes a file"
    rows = (Row("content write, 256 MiB", "s"),)
    _count = 0

    def _pieces(self, mark: int) -> Iterator[bytes]:
        noise = os.urandom(1 << 20)
        for number in range(self.size >> 20):
            yield noise[:-16] + mark.to_bytes(8, "big") + number.to_bytes(8, "big")

    def measure(self, session: Session, subject: Subject) -> Values:
        type(self)._count += 1
        pieces = list(self._pieces(self._count))
        total = hashlib.sha256()
        for piece in pieces:
            total.update(piece)
        digest = f"sha256:{total.hexdigest()}"
        os.sync()
        taken = timed(lambda: subject.client.write_blob("bench-content", digest, digest, iter(pieces), self.size))
        self._delete(subject, digest)
        return {self.rows[0].name: taken}

    def _delete(self, subject: Subject, digest: str) -> None:
        subject.client.content.Delete(content_pb2.DeleteContentRequest(digest=digest), metadata=meta("bench-content"))
        subject.client.collect("bench-content")

    def limit(self, session: Session) -> Values:
        path = Path(session.work) / "content-limit"
        pieces = list(self._pieces(0))
        os.sync()

        def write() -> None:
            total = hashlib.sha256()
            with open(path, "wb") as handle:
                for piece in pieces:
                    handle.write(piece)
                    total.update(piece)
                handle.flush()
                os.fsync(handle.fileno())

        taken = timed(write)
        path.unlink()
        return {self.rows[0].name: taken}


def cases() -> list[Case]:
    """All of this module, in an order in which each finds what the one before left."""
    return [ContentWrite(), Density(), MergedDensity(), Lists(10, last=False), Lists(100, last=False), Lists(1000, last=True), Start()]
