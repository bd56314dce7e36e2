"""Tasks and execs from their start to their end, in the foreground or detached."""

from __future__ import annotations

import os

from pctr import documents, light
from pctr.command import Context, Failed, UsageError, new_id
from pctr.contexts import ExitStack, suppress
from pctr.create import Created, remove_container
from pctr.process import Foreground
from pctr.rpc import CONTAINERS, SNAPSHOTS, TASKS, Client
from pctr.stdio import Fifos, remove_fifos_of
from supervisord_ctr import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from typing import Any
else:
    import _signal as signal  # the module proper wraps these functions in enums, which takes as long as some calls

_RUNNING, _STOPPED = 2, 3


def note(path: str | None, text: str) -> None:
    """Write a pid or id to the file that an option names."""
    if path:
        with open(path, "w", encoding="ascii") as file:
            file.write(text)


def ignore_interrupts() -> None:
    """From now on an impatient user does not stop us: the clean-up is short and must not stay half done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def delete_task(client: Client, container: str) -> None:
    """Delete a task that has ended; one that is gone is fine."""
    with suppress(errors.NotFound):
        client.unary(TASKS + "Delete", light.ProcessId(container_id=container), light.DeleteResponse)


def run_task(
    context: Context, created: Created, mounts: list[light.Mount], *, remove: bool = False,
    remove_unstarted: bool = False, checkpoint: light.Descriptor | None = None, options: light.Any_ | None = None,
) -> int:
    """Create and start the task of a container; its exit status, or 0 at once when detached.

    Takes `tty`, `interactive`, `detach`, `log_uri`, `null_io`, `pid_file` and `no_sig_proxy` of the
    arguments. With `remove` the container goes when the task has ended, with `remove_unstarted` when the
    task could not be made or started: what never ran leaves nothing.
    """
    args, client = context.args, context.client
    with ExitStack() as undo:
        if remove:
            undo.callback(remove_container, client, created)
        quiet = bool(args.log_uri or args.null_io)
        with_input = bool(args.interactive or args.tty) and not quiet
        fifos = None if quiet else Fifos(stdin=with_input, stderr=not args.tty)
        front = Foreground(client, created.id, has_terminal=args.tty)
        front.proxy_signals = not args.no_sig_proxy
        undo.callback(front.close)
        if fifos is not None:
            # A shim waits for a reader, so they are opened even when nobody is going to read them here.
            front.open_fifos(fifos)
            if not args.detach:
                undo.callback(fifos.remove)
            log = ""
        else:
            log = args.log_uri or ""
        request = light.CreateTaskRequest(
            container_id=created.id, rootfs=mounts, terminal=args.tty, checkpoint=checkpoint, options=options,
            stdin=fifos.stdin if fifos else "", stdout=fifos.stdout if fifos else log,
            stderr="" if args.tty else fifos.stderr if fifos else log,
        )
        identity = light.ProcessId(container_id=created.id)
        with ExitStack() as if_failed:
            if fifos is not None:
                if_failed.callback(fifos.remove)
            if remove_unstarted and not remove:
                if_failed.callback(remove_container, client, created)
            task = client.unary(TASKS + "Create", request, light.CreateTaskResponse)
            if_failed.callback(_forget, client, created.id)
            note(args.pid_file, str(task.pid))
            if getattr(args, "net", "") == "bridge":
                _join_bridge(context, created.id, task.pid, undo)
            if args.detach:
                client.unary(TASKS + "Start", identity, light.StartResponse)
                if_failed.pop_all()
                return 0
            never_ran = undo.enter_context(if_failed.pop_all())
        undo.callback(delete_task, client, created.id)

        def start() -> None:
            front.wait_for_exit()
            client.unary(TASKS + "Start", identity, light.StartResponse)
            never_ran.pop_all()

        status = front.relay(start)
        ignore_interrupts()
        return status


def _join_bridge(context: Context, container: str, pid: int, undo: ExitStack) -> None:
    """Put the task on the bridge; in the foreground it leaves it when it has ended."""
    from pctr import bridge

    owner = f"{context.namespace}/{container}"
    bridge.attach(pid, owner)
    if not context.args.detach:
        undo.callback(bridge.detach, pid, owner)


def _forget(client: Client, container: str) -> None:
    with suppress(errors.Error):
        delete_task(client, container)


def get_record(client: Client, name: str) -> light.Container:
    """The container of that id. Raises `NotFound`."""
    record = client.unary(CONTAINERS + "Get", light.ContainerId(id=name), light.ContainerMessage).container
    if record is None:
        raise errors.NotFound(f"container {name}: not found", kind="container", key=name)
    return record


def spec_of(record: light.Container) -> dict[str, Any]:
    """The container's OCI spec."""
    if record.spec is None:
        raise Failed(f"container {record.id}: has no spec")
    spec: dict[str, Any] = documents.loads(record.spec.value)
    return spec


def mounts_of(client: Client, record: light.Container) -> list[light.Mount]:
    """The mounts of a container's snapshot; [] when its spec says where the root is."""
    if not record.snapshot_key:
        return []
    request = light.RemoveSnapshotRequest(snapshotter=record.snapshotter, key=record.snapshot_key)
    return client.unary(SNAPSHOTS + "Mounts", request, light.PrepareSnapshotResponse).mounts


def start_task(context: Context) -> int:
    """`pctr task start`: the task of a container that was created before."""
    args, client = context.args, context.client
    record = get_record(client, args.id)
    args.tty = bool((spec_of(record).get("process") or {}).get("terminal"))
    if args.tty and not args.detach and (args.log_uri or args.null_io):
        raise UsageError("--log-uri and --null-io leave no terminal to show; add --detach")
    created = Created(record.id, [], record.image, record.snapshotter, record.snapshot_key)
    return run_task(context, created, mounts_of(client, record))


def attach_task(context: Context) -> int:
    """`pctr task attach`: join the fifos of a running task; its exit status when it ends."""
    args, client = context.args, context.client
    answer = client.unary(TASKS + "Get", light.ProcessId(container_id=args.id), light.GetProcessResponse)
    process = answer.process or light.Process()
    if process.status == _STOPPED:
        raise errors.FailedPrecondition(f"task {args.id}: has ended with {process.exit_status}")
    paths = {name: getattr(process, name) for name in ("stdin", "stdout", "stderr")}
    fifos = {name: path for name, path in paths.items() if path.startswith("/") and os.path.exists(path)}
    if not fifos.get("stdout") and not fifos.get("stderr"):
        shown = paths["stdout"] or "nowhere"
        raise Failed(f"task {args.id}: its output goes to {shown}, which cannot be joined")
    front = Foreground(client, args.id, has_terminal=process.terminal)
    front.proxy_signals = not args.no_sig_proxy
    front.owns_process = False
    try:
        stdin = "" if args.no_stdin else fifos.get("stdin", "")
        front.open(stdin, fifos.get("stdout", ""), fifos.get("stderr", ""))
        return front.relay(front.wait_for_exit)
    finally:
        front.close()


def exec_in_task(context: Context, container: str, command: list[str]) -> int:
    """`pctr task exec`: another process in a running task; its exit status, or 0 at once when detached."""
    from supervisord_ctr.oci.spec import PROCESS_TYPE_URL

    args, client = context.args, context.client
    process = exec_process(context, container, command)
    exec_id = args.exec_id or f"exec-{new_id()}"
    with ExitStack() as undo:
        fifos = None
        if not args.log_uri and not args.detach:
            fifos = Fifos(stdin=args.interactive or args.tty, stderr=not args.tty)
            undo.callback(fifos.remove)
        front = Foreground(client, container, exec_id, has_terminal=args.tty)
        front.proxy_signals = not args.no_sig_proxy
        undo.callback(front.close)
        if fifos is not None:
            front.open_fifos(fifos)
        log = args.log_uri or ""
        client.unary(TASKS + "Exec", light.ExecProcessRequest(
            container_id=container, exec_id=exec_id, terminal=args.tty,
            stdin=fifos.stdin if fifos else "", stdout=fifos.stdout if fifos else log,
            stderr="" if args.tty else fifos.stderr if fifos else log,
            spec=light.Any_(type_url=PROCESS_TYPE_URL, value=documents.dumps(process).encode()),
        ), light.Empty)
        identity = light.ProcessId(container_id=container, exec_id=exec_id)
        with ExitStack() as if_failed:
            if_failed.callback(_delete_exec, client, identity)
            if args.detach:
                client.unary(TASKS + "Start", identity, light.StartResponse)
                if_failed.pop_all()
                print(exec_id)
                return 0

            def start() -> None:
                front.wait_for_exit()
                client.unary(TASKS + "Start", identity, light.StartResponse)

            # Its record goes whether it ended well or not.
            status = front.relay(start)
            ignore_interrupts()
            return status


def _delete_exec(client: Client, identity: light.ProcessId) -> None:
    with suppress(errors.NotFound, errors.FailedPrecondition, errors.Unavailable):
        client.unary(TASKS + "DeleteProcess", identity, light.DeleteResponse)


def exec_process(context: Context, container: str, command: list[str]) -> dict[str, Any]:
    """The OCI process of an exec: the container's own, changed as the options say."""
    from supervisord_ctr.oci.spec import SpecBuilder

    args, client = context.args, context.client
    spec = spec_of(get_record(client, container))
    builder = SpecBuilder("", container, spec=spec)
    builder.process.pop("consoleSize", None)
    builder.process["terminal"] = bool(args.tty)
    builder.with_args(command)
    if args.tty:
        from pctr import terminal

        width, height = terminal.size(1) if terminal.size(1) != (0, 0) else terminal.size(0)
        builder.with_terminal(width, height)
    if args.env:
        builder.with_env(args.env)
    if args.workdir:
        builder.with_cwd(args.workdir)
    if args.user is not None:
        builder.process["user"] = _user_of_running(client, container, args.user)
    if args.privileged:
        from supervisord_ctr.oci import capabilities

        builder.with_capabilities(capabilities.current()).with_new_privileges()
    return builder.process


def _user_of_running(client: Client, container: str, user: str) -> dict[str, Any]:
    """Who a user is inside a running container: looked up below its root, which /proc shows."""
    from supervisord_ctr.oci.users import resolve

    answer = client.unary(TASKS + "Get", light.ProcessId(container_id=container), light.GetProcessResponse)
    if answer.process is None or not answer.process.pid:
        raise errors.FailedPrecondition(f"task {container}: has no process")
    root = os.open(f"/proc/{answer.process.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return dict(resolve(root, user).to_spec())
    finally:
        os.close(root)


def remove_task(client: Client, container: str, exec_id: str = "", *, force: bool = False) -> int:
    """Delete a task or exec, killed first with `force`, and the fifos of our making; its exit status."""
    identity = light.ProcessId(container_id=container, exec_id=exec_id)
    process = client.unary(TASKS + "Get", identity, light.GetProcessResponse).process or light.Process()
    if force and process.status != _STOPPED:
        wait = client.start(TASKS + "Wait", identity, light.WaitResponse)
        with suppress(errors.NotFound, errors.FailedPrecondition):
            client.unary(TASKS + "Kill", light.KillRequest(
                container_id=container, exec_id=exec_id, signal=9, all=not exec_id), light.Empty)
            if process.status >= _RUNNING:
                wait.result()
        wait.cancel()
    method = "DeleteProcess" if exec_id else "Delete"
    answer = client.unary(TASKS + method, identity, light.DeleteResponse)
    remove_fifos_of([process.stdin, process.stdout, process.stderr])
    return int(answer.exit_status) & 0xFF
