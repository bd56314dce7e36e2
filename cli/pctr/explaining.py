"""What `pctr explain` knows: stage, what is waited for and for how long, how it ended and who asked.

Pods and their containers are looked up over CRI, then containers of the namespace over the native
API. Facts come from what the daemon tells; nothing is guessed.
"""

from __future__ import annotations

import json
import signal
import time
from typing import Any

from pctr import pods, services
from pctr.command import Context
from pctr.output import human_size, human_span, rfc3339
from pctr.rpc import CRI_RUNTIME
from supervisord_ctr import errors
from supervisord_ctr.api.cri.v1 import cri_pb2
from supervisord_ctr.api.types.task import task_pb2

Facts = list[tuple[str, Any]]


def explain(context: Context, name: str) -> Facts:
    """Everything that is known, in the order in which a person would ask."""
    client = context.client
    try:
        return _pod(context, pods.find_pod(client, name))
    except (errors.NotFound, errors.Unimplemented):
        pass
    try:
        return _pod_container(context, pods.find_container(client, name).id)
    except (errors.NotFound, errors.Unimplemented):
        return _container(context, name)


def _stamp(nanoseconds: int) -> str:
    if nanoseconds <= 0:
        return "-"
    moment = rfc3339(nanoseconds // 10**9)
    return f"{moment} ({human_span(time.time() - nanoseconds / 1e9)} ago)"


def _stage(facts: Facts, info: dict[str, Any]) -> None:
    if info.get("stage"):
        facts.append(("stage", info["stage"]))
    facts.append(("doing now", info.get("doing") or "nothing"))


def _pod(context: Context, pod: str) -> Facts:
    status = pods.pod_status(context.client, pod)
    info, metadata = pods.verbose(status.info), status.status.metadata
    facts: Facts = [
        ("pod", f"{metadata.namespace}/{metadata.name}"), ("id", pod),
        ("state", pods.POD_STATES.get(status.status.state, "unknown")),
    ]
    _stage(facts, info)
    facts.append(("created", _stamp(status.status.created_at)))
    addresses = [status.status.network.ip, *(entry.ip for entry in status.status.network.additional_ips)]
    facts.append(("addresses", ", ".join(filter(None, addresses)) or "none"))
    facts.append(("runtime", status.status.runtime_handler or "default"))
    for message in info.get("lastErrors") or ():
        facts.append(("error", message))
    for container in pods.list_containers(context.client):
        if container.pod_sandbox_id == pod:
            told = _pod_container(context, container.id, brief=True)
            facts.append((f"container {container.metadata.name}", "\n".join(f"{key}: {value}" for key, value in told)))
    if status.status.state != cri_pb2.SANDBOX_READY:
        facts += _runtime_troubles(context)
    return facts


def _runtime_troubles(context: Context) -> Facts:
    """Conditions of the runtime that do not hold, such as a network that is not ready."""
    response = context.client.unary(CRI_RUNTIME + "Status", cri_pb2.StatusRequest(), cri_pb2.StatusResponse)
    return [
        (f"runtime {condition.type}", f"{condition.reason}: {condition.message}")
        for condition in response.status.conditions if not condition.status
    ]


def describe_exit(code: int) -> str:
    """An exit status in words: `137, killed by SIGKILL`."""
    if 128 < code < 128 + signal.NSIG:
        try:
            return f"{code}, killed by {signal.Signals(code - 128).name}"
        except ValueError:
            pass
    return str(code)


def _pod_container(context: Context, container: str, *, brief: bool = False) -> Facts:
    response = pods.container_status(context.client, container)
    status, info = response.status, pods.verbose(response.info)
    facts: Facts = []
    if not brief:
        facts += [("container", status.metadata.name), ("id", container), ("pod", info.get("sandboxID") or "-"),
                  ("image", status.image.user_specified_image or status.image.image)]
    facts.append(("state", pods.CONTAINER_STATES.get(status.state, "unknown")))
    _stage(facts, info)
    if not brief:
        facts.append(("created", _stamp(status.created_at)))
    facts.append(("started", _stamp(status.started_at)))
    if status.state == cri_pb2.CONTAINER_EXITED:
        facts += [("finished", _stamp(status.finished_at)), ("exit", describe_exit(status.exit_code)),
                  ("reason", status.reason or "-")]
        facts += _death(info)
    if status.message:
        facts.append(("message", status.message))
    for message in info.get("lastErrors") or ():
        facts.append(("error", message))
    return facts


def _death(info: dict[str, Any]) -> Facts:
    facts: Facts = []
    if info.get("oomKilled"):
        where = info["oomKilled"] if isinstance(info["oomKilled"], str) else info.get("cgroup") or "its cgroup"
        facts.append(("out of memory", where))
    if info.get("endAskedBy"):
        facts.append(("end asked by", info["endAskedBy"]))
    return facts


def _container(context: Context, name: str) -> Facts:
    client = context.client
    container = services.get_container(client, name)
    facts: Facts = [
        ("container", container.id), ("namespace", context.namespace), ("image", container.image or "-"),
        ("runtime", container.runtime.name),
        ("created", _stamp(container.created_at.seconds * 10**9 + container.created_at.nanos)),
    ]
    try:
        task = services.get_task(client, name)
    except errors.NotFound:
        return [*facts, ("state", "no task: it was never started, or its task was deleted")]
    words = {task_pb2.CREATED: "created, not started", task_pb2.RUNNING: "running", task_pb2.STOPPED: "exited",
             task_pb2.PAUSED: "paused", task_pb2.PAUSING: "pausing"}
    facts += [("state", words.get(task.status, "unknown, being recovered")), ("pid", task.pid or "-")]
    if task.status == task_pb2.STOPPED:
        facts += [("finished", _stamp(task.exited_at.seconds * 10**9)), ("exit", describe_exit(task.exit_status))]
    elif task.pid:
        facts += _alive(context, name, task.pid)
    try:
        spec = json.loads(container.spec.value)
        facts.append(("command", " ".join((spec.get("process") or {}).get("args") or ())))
    except ValueError:
        pass
    return facts


def _alive(context: Context, name: str, pid: int) -> Facts:
    from pctr.shims import memory_of, parent_of

    facts: Facts = []
    try:
        with open(f"/proc/{pid}/wchan", encoding="ascii") as file:
            waiting = file.read().strip()
        if waiting not in ("", "0"):
            facts.append(("waits in the kernel", waiting))
    except OSError:
        pass
    memory = memory_of(pid)
    if memory is not None:
        facts.append(("memory", human_size(memory)))
    shim = parent_of(pid)
    facts.append(("shim", shim if shim > 1 else "not seen: its shim has died"))
    return facts
