"""`pctr task`: the running processes of containers."""

from __future__ import annotations

from pctr.command import Command, Context, UsageError, format_option
from pctr.options import REMAINDER
from supervisord_ctr import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pctr.command import Arguments

_STATUS = {0: "UNKNOWN", 1: "CREATED", 2: "RUNNING", 3: "STOPPED", 4: "PAUSED", 5: "PAUSING"}


# -- look ----------------------------------------------------------------------------------------------


def _list_arguments(parser: Arguments) -> None:
    format_option(parser, "ids")


def _list(context: Context) -> None:
    from pctr import output
    from pctr.services import list_tasks

    table = output.Table("TASK", "PID", "STATUS")
    for task in list_tasks(context.client):
        table.add(task.container_id or task.id, task.pid, _STATUS.get(task.status, "UNKNOWN"))
    table.show(context.args)


def _ps_arguments(parser: Arguments) -> None:
    format_option(parser)
    parser.add_argument("id", metavar="CONTAINER")


def _ps(context: Context) -> None:
    from pctr import output
    from pctr.rpc import TASKS
    from supervisord_ctr.api.runc.v1 import options_pb2
    from supervisord_ctr.api.services.tasks.v1 import tasks_pb2

    table = output.Table("PID", "INFO")
    response = context.client.unary(
        TASKS + "ListPids", tasks_pb2.ListPidsRequest(container_id=context.args.id), tasks_pb2.ListPidsResponse)
    for process in response.processes:
        info = ""
        if process.info.type_url.endswith("ProcessDetails"):
            info = options_pb2.ProcessDetails.FromString(process.info.value).exec_id
        table.add(process.pid, info)
    table.show(context.args)


def _metrics_arguments(parser: Arguments) -> None:
    parser.add_argument("--format", choices=("table", "json"), default="table", help="how to print")
    parser.add_argument("id", metavar="CONTAINER")


def _metrics(context: Context) -> None:
    from pctr.task_metrics import show_metrics

    show_metrics(context)


def _wait_arguments(parser: Arguments) -> None:
    parser.add_argument("--exec-id", default="", metavar="ID", help="an exec of the task")
    parser.add_argument("id", metavar="CONTAINER")


def _wait(context: Context) -> int:
    from pctr import light
    from pctr.rpc import TASKS

    answer = context.client.unary(
        TASKS + "Wait", light.ProcessId(container_id=context.args.id, exec_id=context.args.exec_id),
        light.WaitResponse,
    )
    print(answer.exit_status)
    return int(answer.exit_status) & 0xFF


# -- start, attach, exec ---------------------------------------------------------------------------------


def _start_arguments(parser: Arguments) -> None:
    parser.add_argument("-d", "--detach", action="store_true", help="do not wait for it")
    parser.add_argument("-i", "--interactive", action="store_true", help="pass our standard input on")
    parser.add_argument("--null-io", action="store_true", help="throw output away")
    parser.add_argument("--log-uri", metavar="URI", help="where output goes: file:///path, binary:///path?key=value")
    parser.add_argument("--pid-file", metavar="FILE", help="write the process's id there")
    parser.add_argument("--no-sig-proxy", action="store_true", help="do not forward signals")
    parser.add_argument("id", metavar="CONTAINER")


def _start(context: Context) -> int:
    from pctr.running import start_task

    return start_task(context)


def _attach_arguments(parser: Arguments) -> None:
    parser.add_argument("--no-stdin", action="store_true", help="do not pass our standard input on")
    parser.add_argument("--no-sig-proxy", action="store_true", help="do not forward signals")
    parser.add_argument("id", metavar="CONTAINER")


def _attach(context: Context) -> int:
    from pctr.running import attach_task

    return attach_task(context)


def _exec_arguments(parser: Arguments) -> None:
    parser.add_argument("--exec-id", default="", metavar="ID", help="id of the exec (default: made up)")
    parser.add_argument("-t", "--tty", action="store_true", help="give the process a terminal")
    parser.add_argument("-i", "--interactive", action="store_true", help="pass our standard input on")
    parser.add_argument("-d", "--detach", action="store_true", help="do not wait for it")
    parser.add_argument("-e", "--env", action="append", default=[], metavar="NAME=VALUE", help="environment entry")
    parser.add_argument("-w", "--workdir", "--cwd", metavar="DIR", help="working directory")
    parser.add_argument("-u", "--user", metavar="USER[:GROUP]", help="user and group, by name or number")
    parser.add_argument("--privileged", action="store_true", help="all capabilities")
    parser.add_argument("--log-uri", metavar="URI", help="where output goes")
    parser.add_argument("--no-sig-proxy", action="store_true", help="do not forward signals")
    parser.add_argument("words", nargs=REMAINDER, metavar="CONTAINER COMMAND …")


def _exec(context: Context) -> int:
    from pctr.running import exec_in_task

    words = context.args.words
    if words and words[0] == "--":
        words = words[1:]
    if words[1:2] == ["--"]:
        words = [words[0], *words[2:]]
    if len(words) < 2 or words[1].startswith("-"):
        raise UsageError("what to run in which container? see 'pctr task exec --help'")
    return exec_in_task(context, words[0], words[1:])


# -- change --------------------------------------------------------------------------------------------


def _kill_arguments(parser: Arguments) -> None:
    parser.add_argument("-s", "--signal", default="", metavar="SIGNAL", help="signal (default: the image's, then TERM)")
    parser.add_argument("-a", "--all", action="store_true", help="every process of the task")
    parser.add_argument("--exec-id", default="", metavar="ID", help="an exec of the task")
    parser.add_argument("id", metavar="CONTAINER")


def _kill(context: Context) -> None:
    from pctr import light
    from pctr.create import STOP_SIGNAL_LABEL
    from pctr.rpc import CONTAINERS, TASKS
    from pctr.signals import parse_signal

    args = context.args
    name = args.signal
    if not name:
        record = context.client.unary(
            CONTAINERS + "Get", light.ContainerId(id=args.id), light.ContainerMessage).container
        name = (record.labels.get(STOP_SIGNAL_LABEL) if record is not None else "") or "TERM"
    context.client.unary(TASKS + "Kill", light.KillRequest(
        container_id=args.id, exec_id=args.exec_id, signal=parse_signal(name), all=args.all), light.Empty)


def _id_arguments(parser: Arguments) -> None:
    parser.add_argument("id", metavar="CONTAINER")


def _pause(context: Context) -> None:
    from google.protobuf.empty_pb2 import Empty

    from pctr.rpc import TASKS
    from supervisord_ctr.api.services.tasks.v1 import tasks_pb2

    context.client.unary(TASKS + "Pause", tasks_pb2.PauseTaskRequest(container_id=context.args.id), Empty)


def _resume(context: Context) -> None:
    from google.protobuf.empty_pb2 import Empty

    from pctr.rpc import TASKS
    from supervisord_ctr.api.services.tasks.v1 import tasks_pb2

    context.client.unary(TASKS + "Resume", tasks_pb2.ResumeTaskRequest(container_id=context.args.id), Empty)


def _remove_arguments(parser: Arguments) -> None:
    parser.add_argument("-f", "--force", action="store_true", help="kill what still runs")
    parser.add_argument("--exec-id", default="", metavar="ID", help="an exec of the task, for one container")
    parser.add_argument("ids", nargs="+", metavar="CONTAINER")


def _remove(context: Context) -> int:
    from pctr import output
    from pctr.running import remove_task

    status = 0
    for name in context.args.ids:
        try:
            code = remove_task(context.client, name, context.args.exec_id, force=context.args.force)
            print(name)
            if context.args.exec_id:
                status = code
            elif code:
                output.warn(f"task {name} ended with status {code}")
        except errors.Error as error:
            output.warn(str(error))
            status = 1
    return status


def _checkpoint_arguments(parser: Arguments) -> None:
    parser.add_argument("--exit", action="store_true", help="stop the container afterwards")
    parser.add_argument("--leave-running", action="store_true", help="let it run on (the default)")
    parser.add_argument("--image-path", default="", metavar="DIR", help="folder for criu's images")
    parser.add_argument("--work-path", default="", metavar="DIR", help="folder for criu's work files and log")
    parser.add_argument("--tcp-established", action="store_true", help="also with open TCP connections")
    parser.add_argument("--file-locks", action="store_true", help="also with file locks")
    parser.add_argument("id", metavar="CONTAINER")


def _checkpoint(context: Context) -> None:
    from pctr.checkpoints import checkpoint_task

    checkpoint_task(context)


def _restore_arguments(parser: Arguments) -> None:
    parser.add_argument("--image-path", default="", metavar="DIR", help="folder with criu's images")
    parser.add_argument("--checkpoint", default="", metavar="DIGEST", help="checkpoint in the content store")
    parser.add_argument("-d", "--detach", action="store_true", help="do not wait for it")
    parser.add_argument("id", metavar="CONTAINER")


def _restore(context: Context) -> int:
    from pctr.checkpoints import restore_task

    return restore_task(context)


def _update_arguments(parser: Arguments) -> None:
    parser.add_argument("-m", "--memory", metavar="SIZE", help="memory limit, such as 512m")
    parser.add_argument("--memory-swap", metavar="SIZE", help="memory and swap together")
    parser.add_argument("--memory-reservation", metavar="SIZE", help="soft memory limit")
    parser.add_argument("--cpus", type=float, metavar="N", help="CPUs' worth of time")
    parser.add_argument("--cpu-shares", type=int, metavar="N", help="relative weight")
    parser.add_argument("--cpu-quota", type=int, metavar="US", help="microseconds in each period")
    parser.add_argument("--cpu-period", type=int, metavar="US", help="period in microseconds")
    parser.add_argument("--cpuset-cpus", metavar="LIST", help="CPUs to use")
    parser.add_argument("--cpuset-mems", metavar="LIST", help="memory nodes to use")
    parser.add_argument("--pids-limit", type=int, metavar="N", help="most processes; -1 for no limit")
    parser.add_argument("--annotation", action="append", default=[], metavar="KEY=VALUE", help="annotation to pass on")
    parser.add_argument("id", metavar="CONTAINER")


def _update(context: Context) -> None:
    import json

    from google.protobuf.any_pb2 import Any
    from google.protobuf.empty_pb2 import Empty

    from pctr.command import parse_labels
    from pctr.create import set_resources
    from pctr.rpc import TASKS
    from supervisord_ctr.api.services.tasks.v1 import tasks_pb2
    from supervisord_ctr.oci.spec import RESOURCES_TYPE_URL, SpecBuilder

    builder = SpecBuilder("", "", spec={})
    set_resources(builder, context.args)
    if not builder.spec:
        raise UsageError("nothing to change is given")
    context.client.unary(TASKS + "Update", tasks_pb2.UpdateTaskRequest(
        container_id=context.args.id, annotations=parse_labels(context.args.annotation),
        resources=Any(type_url=RESOURCES_TYPE_URL, value=json.dumps(builder.resources).encode()),
    ), Empty)


COMMANDS = (
    Command("ls", "list tasks", "pctr task ls --format json", _list_arguments, _list, ("list",)),
    Command("start", "start a container that was created", "pctr task start web", _start_arguments, _start),
    Command("attach", "join the streams of a running task", "pctr task attach web", _attach_arguments, _attach),
    Command("exec", "run another process in a running task", "pctr task exec -t web sh", _exec_arguments, _exec),
    Command("kill", "send a signal to a task", "pctr task kill --signal KILL web", _kill_arguments, _kill),
    Command("pause", "freeze a task", "pctr task pause web", _id_arguments, _pause),
    Command("resume", "let a frozen task run on", "pctr task resume web", _id_arguments, _resume),
    Command("wait", "wait for a task's end and print its exit status", "pctr task wait web", _wait_arguments, _wait),
    Command("ps", "list the processes of a task", "pctr task ps web", _ps_arguments, _ps),
    Command("metrics", "show what a task uses", "pctr task metrics web", _metrics_arguments, _metrics, ("metric",)),
    Command("rm", "delete tasks that have ended", "pctr task rm --force web", _remove_arguments, _remove,
            ("remove", "delete", "del")),
    Command("checkpoint", "freeze a task's state with CRIU", "pctr task checkpoint --image-path /var/tmp/web web",
            _checkpoint_arguments, _checkpoint),
    Command("restore", "start a container from a checkpoint", "pctr task restore --image-path /var/tmp/web web",
            _restore_arguments, _restore),
    Command("update", "change the limits of a running task", "pctr task update --memory 512m web", _update_arguments,
            _update),
)
