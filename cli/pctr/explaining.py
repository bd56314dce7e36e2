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
from pctr.reports import EXPLAIN_PART, ask
from pctr.rpc import CRI_RUNTIME
from supervisord_ctr import errors
from supervisord_ctr.api.cri.v1 import cri_pb2
from supervisord_ctr.api.types.task import task_pb2

#: The API namespace of a kubelet's containers.
KUBERNETES = "k8s.io"

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
        pass
    try:
        return _container(context, name)
    except errors.NotFound:
        # It may be under way, or have failed before it was there.
        facts = _told(_ask(context, {"names": [name]}))
        if not any(key == "error" or value != "nothing" for key, value in facts):
            raise
        return [("pod or container", name), ("state", "is not there"), *facts]


def _ask(context: Context, question: dict[str, Any]) -> dict[str, Any]:
    """The daemon's answer, nothing from one that is not asked this way."""
    try:
        return ask(context, *EXPLAIN_PART, question) or {}
    except errors.NotFound:
        return {}


def _told(answer: dict[str, Any]) -> Facts:
    """What is being done now and what failed lately."""
    facts: Facts = [("doing now", "\n".join(answer.get("doing") or ()) or "nothing")]
    for entry in answer.get("errors") or ():
        since = human_span(time.time() - float(entry.get("at") or 0))
        stage = f" ({entry['stage']})" if entry.get("stage") else ""
        facts.append(("error", f"{since} ago, {entry.get('on')}{stage}: {entry.get('message')}"))
    return facts


def _stamp(nanoseconds: int) -> str:
    if nanoseconds <= 0:
        return "-"
    moment = rfc3339(nanoseconds // 10**9)
    return f"{moment} ({human_span(time.time() - nanoseconds / 1e9)} ago)"


def _pod(context: Context, pod: str) -> Facts:
    status = pods.pod_status(context.client, pod)
    info, metadata = pods.verbose(status.info), status.status.metadata
    facts: Facts = [
        ("pod", f"{metadata.namespace}/{metadata.name}"), ("id", pod),
        ("state", pods.POD_STATES.get(status.status.state, "unknown")),
    ]
    if info.get("stage"):
        facts.append(("stage", info["stage"]))
    answer = _ask(context, {"names": [pod, f"{metadata.namespace}/{metadata.name}"]})
    told = _told(answer)
    facts.append(told[0] if answer else ("doing now", info.get("doing") or "nothing"))
    facts.append(("created", _stamp(status.status.created_at)))
    addresses = [status.status.network.ip, *(entry.ip for entry in status.status.network.additional_ips)]
    facts.append(("addresses", ", ".join(filter(None, addresses)) or "none"))
    facts.append(("runtime", status.status.runtime_handler or "default"))
    facts += told[1:]
    for container in pods.list_containers(context.client):
        if container.pod_sandbox_id == pod:
            inner = _pod_container(context, container.id, brief=True)
            text = "\n".join(f"{key}: {value}" for key, value in inner)
            facts.append((f"container {container.metadata.name}", text))
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
    if info.get("stage"):
        facts.append(("stage", info["stage"]))
    answer = {} if brief else _ask(context, {"names": [container], "namespace": KUBERNETES, "container": container})
    if info.get("doing") or not brief:
        facts.append(("doing now", info.get("doing") or "nothing"))
    if not brief:
        facts.append(("created", _stamp(status.created_at)))
    facts.append(("started", _stamp(status.started_at)))
    if status.state == cri_pb2.CONTAINER_EXITED:
        facts += [("finished", _stamp(status.finished_at)), ("exit", describe_exit(status.exit_code)),
                  ("reason", status.reason or "-")]
        facts += _death(info)
    if status.message:
        facts.append(("message", status.message))
    if status.state == cri_pb2.CONTAINER_RUNNING and not brief:
        facts += _task_facts(answer)
        if info.get("pid"):
            facts += _alive(context, container, int(info["pid"]))
    if not brief:
        facts += _told(answer)[1:]
    return facts


def _death(info: dict[str, Any]) -> Facts:
    facts: Facts = []
    if info.get("oomKilled"):
        level, group = info.get("oomLevel"), info.get("cgroup") or "its cgroup"
        facts.append(("out of memory", f"the limit of the {level} was reached ({group})" if level else group))
    if info.get("endAskedBy"):
        facts.append(("end asked by", _asked(str(info["endAskedBy"]), int(info.get("askedSignal") or 0))))
    elif info.get("askedSignal"):
        facts.append(("end asked by", _asked("a client", int(info["askedSignal"]))))
    elif info.get("signal") and not info.get("oomKilled"):
        facts.append(("end asked by", "nobody here: the signal came from inside or from elsewhere on this machine"))
    return facts


def _asked(who: str, number: int) -> str:
    return f"{who}, last with {_signal_name(number)}" if number else who


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _task_facts(answer: dict[str, Any]) -> Facts:
    """What the shim tells, and why a task waits."""
    facts: Facts = []
    if answer.get("waits"):
        facts.append(("waits for", answer["waits"]))
    shim = answer.get("shim") or {}
    if shim.get("execs"):
        facts.append(("execs", ", ".join(shim["execs"])))
    if shim.get("attached"):
        facts.append(("attached clients", int(shim["attached"])))
    if shim.get("dropped_bytes"):
        facts.append(("output dropped", human_size(shim["dropped_bytes"])))
    if shim.get("oom_kills"):
        facts.append(("killed for memory", f"{int(shim['oom_kills'])} of its processes"))
    return facts


def _exit_facts(end: dict[str, Any]) -> Facts:
    """The shim's exit record in words."""
    facts: Facts = []
    if end.get("oom_kills") and end.get("oom_level"):
        facts.append(("out of memory", f"the limit of the {end['oom_level']} was reached"))
    if end.get("asked_signal"):
        when = _stamp(int(float(end.get("asked_at") or 0) * 1e9))
        facts.append(("end asked by", f"{_asked('a client', int(end['asked_signal']))}, {when}"))
    elif end.get("signal") and not end.get("oom_kills"):
        facts.append(("end asked by", "nobody here: the signal came from inside or from elsewhere on this machine"))
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
    answer = _ask(context, {"namespace": context.namespace, "container": name})
    facts += _task_facts(answer)
    if task.status == task_pb2.STOPPED:
        facts += [("finished", _stamp(task.exited_at.seconds * 10**9)), ("exit", describe_exit(task.exit_status))]
        facts += _exit_facts(answer.get("exit") or {})
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
