"""What this room knows of one task, for `pctr explain`: its shim, why it waits, how it ended (P22, P23)."""

from __future__ import annotations

from typing import Any

from supervisord_ctr import errors
from supervisord_ctr.api.shim.v1 import shim_pb2
from supervisord_ctr.runtime.connection import seconds
from supervisord_ctr.runtime.shims import SHIM_SERVICE
from supervisord_ctr.runtime.tasks import Tasks


async def explain(tasks: Tasks, namespace: str, container: str) -> dict[str, Any]:
    """"waits" (why it cannot be asked), "shim" and "exit", each only when there is something to tell."""
    found: dict[str, Any] = {}
    if (namespace, container) not in tasks.known():
        return found
    shim = next(
        (shim for shim in tasks.shims.all() if shim.namespace == namespace and container in shim.tasks), None)
    if shim is not None:
        told = found["shim"] = {
            "pid": shim.record.pid, "address": shim.address, "runtime": shim.record.runtime,
            "group": shim.record.group,
        }
        if not shim.record.binary:
            try:
                answer = await shim.service.call_service(
                    SHIM_SERVICE, "Info", shim_pb2.InfoRequest(), shim_pb2.InfoResponse, tasks.config.state_timeout)
            except errors.Error as error:
                found["waits"] = f"its shim does not answer: {error.message}"
                return found
            told["started_at"] = seconds(answer.started_at)
            for entry in answer.containers:
                if entry.id == container:
                    told.update(execs=list(entry.execs), attached=entry.attached, dropped_bytes=entry.dropped_bytes,
                                oom_kills=entry.oom_kills)
    try:
        records = await tasks.exit_records(namespace, container)
    except errors.NotFound:
        return found
    except errors.Unimplemented:  # a foreign shim keeps none that we could read
        return found
    except errors.Error as error:
        found["waits"] = error.message
        return found
    for record in records:
        if record.id == container and not record.exec_id:
            found["exit"] = {
                "status": record.exit_status, "signal": record.signal, "at": seconds(record.exited_at),
                "oom_kills": record.oom_kills, "oom_level": record.oom_level,
                "asked_signal": record.asked_signal, "asked_at": seconds(record.asked_at),
            }
    return found
