"""pctr.shim.v1.Shim: what our own daemon asks beyond the task service."""

from __future__ import annotations

from dataclasses import replace

from google.protobuf.empty_pb2 import Empty

from pctr_shim import __version__, records
from pctr_shim.config import ShimConfig
from pctr_shim.container import Container
from pctr_shim.process import Process
from pctr_shim.publisher import Publisher
from pctr_shim.service import TaskService
from pctr_shim.values import timestamp
from supervisord_ctr.api.shim.v1 import shim_pb2 as api
from supervisord_ctr.ttrpc.server import Context, Method

SERVICE = "pctr.shim.v1.Shim"


class PrivateService:
    """Answers from memory; nothing here waits for a container."""

    def __init__(self, config: ShimConfig, tasks: TaskService, publisher: Publisher) -> None:
        self._config = config
        self._tasks = tasks
        self._publisher = publisher

    def methods(self) -> dict[str, Method]:
        """The service's methods by name."""
        return {
            "Info": Method(api.InfoRequest, self.info),
            "ReopenLog": Method(api.ReopenLogRequest, self.reopen_log),
            "ExitRecords": Method(api.ExitRecordsRequest, self.exit_records),
        }

    async def info(self, request: api.InfoRequest, context: Context) -> api.InfoResponse:
        """How the shim is."""
        return api.InfoResponse(
            pid=self._config.pid, version=__version__, namespace=self._config.namespace, group=self._config.group,
            containers=[_container_info(container) for container in self._tasks.containers.values()],
            events_queued=len(self._publisher), started_at=timestamp(self._tasks.started_at),
        )

    async def reopen_log(self, request: api.ReopenLogRequest, context: Context) -> Empty:
        """Open the container's CRI log anew."""
        self._tasks.find(request.id).init.io.reopen_logs()
        return Empty()

    async def exit_records(self, request: api.ExitRecordsRequest, context: Context) -> api.ExitRecordsResponse:
        """How processes ended."""
        wanted = [self._tasks.find(request.id)] if request.id else list(self._tasks.containers.values())
        return api.ExitRecordsResponse(records=[
            _exit_record(container, process)
            for container in wanted
            for process in (container.init, *container.execs.values()) if process.exit is not None
        ])


def _container_info(container: Container) -> api.ContainerInfo:
    init = container.init
    return api.ContainerInfo(
        id=container.id, bundle=container.bundle, pid=init.pid, status=init.state.name,
        execs=list(container.execs), attached=init.io.attached, dropped_bytes=init.io.dropped_bytes,
        oom_kills=container.oom_kills, timings=container.timings,
    )


def _exit_record(container: Container, process: Process) -> api.ExitRecord:
    record = records.read(container.bundle, process.exec_id)
    if record is None:  # the disk took none: what is in memory is as true
        assert process.exit is not None
        record = records.ExitRecord(
            container.id, process.exec_id, process.exit.pid, process.exit.status, process.exit.at,
            oom_kills=container.oom_kills, oom_level=container.oom_level,
        )
    record = replace(record, id=container.id)
    return api.ExitRecord(
        id=record.id, exec_id=record.exec_id, pid=record.pid, exit_status=record.exit_status,
        exited_at=timestamp(record.exited_at), signal=record.signal, oom_kills=record.oom_kills,
        oom_level=record.oom_level, asked_signal=record.asked_signal, asked_at=timestamp(record.asked_at),
    )
