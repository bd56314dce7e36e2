"""`pctr pod exec`, `attach` and `port-forward`: what kubectl does through a kubelet, without one.

Owns the user's side of a streaming session: standard streams, terminal, listening ports. The daemon
is asked for a URL over CRI; everything after that is `supervisord_ctr.streaming.client`. Works with
any CRI runtime. `pctr.commands.pod` lists these commands in its group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pctr.command import Command, Context, Failed, UsageError
from pctr.light import BOOL, STRING, STRINGS, Message
from pctr.options import REMAINDER
from pctr.rpc import CRI_RUNTIME

if TYPE_CHECKING:
    from pctr.command import Arguments


class ExecRequest(Message):
    """runtime.v1.ExecRequest"""

    container_id: str
    cmd: list[str]
    tty: bool
    stdin: bool
    stdout: bool
    stderr: bool
    FIELDS: ClassVar = {
        1: ("container_id", STRING), 2: ("cmd", STRINGS), 3: ("tty", BOOL), 4: ("stdin", BOOL), 5: ("stdout", BOOL),
        6: ("stderr", BOOL),
    }


class AttachRequest(Message):
    """runtime.v1.AttachRequest"""

    container_id: str
    stdin: bool
    tty: bool
    stdout: bool
    stderr: bool
    FIELDS: ClassVar = {
        1: ("container_id", STRING), 2: ("stdin", BOOL), 3: ("tty", BOOL), 4: ("stdout", BOOL), 5: ("stderr", BOOL),
    }


class PortForwardRequest(Message):
    """runtime.v1.PortForwardRequest; which ports is said later, stream by stream."""

    pod_sandbox_id: str
    FIELDS: ClassVar = {1: ("pod_sandbox_id", STRING)}


class UrlResponse(Message):
    """runtime.v1.ExecResponse, AttachResponse and PortForwardResponse are alike."""

    url: str
    FIELDS: ClassVar = {1: ("url", STRING)}


def _stream_options(parser: Arguments) -> None:
    parser.add_argument("-i", "--interactive", action="store_true", help="pass our standard input on")
    parser.add_argument("-t", "--tty", action="store_true", help="be the process's terminal")


def _exec_arguments(parser: Arguments) -> None:
    _stream_options(parser)
    parser.add_argument("container", metavar="CONTAINER", help="id, beginning of an id, or name")
    parser.add_argument("words", nargs=REMAINDER, metavar="COMMAND …", help="what to run in it")


def _attach_arguments(parser: Arguments) -> None:
    _stream_options(parser)
    parser.add_argument("container", metavar="CONTAINER", help="id, beginning of an id, or name")


def _forward_arguments(parser: Arguments) -> None:
    parser.add_argument("--bind", metavar="ADDRESS", default="127.0.0.1", help="listen here (default: 127.0.0.1)")
    parser.add_argument("pod", metavar="POD", help="id, beginning of an id, or name")
    parser.add_argument("words", nargs=REMAINDER, metavar="[LOCAL:]REMOTE …",
                        help="ports; a local port of 0 takes a free one")


def _container(context: Context) -> str:
    """The id of the container that is meant."""
    from pctr import pods

    return pods.find_container(context.client, context.args.container).id


def run_exec(context: Context) -> int:
    """Run a command in a pod's container and pass its exit status through."""
    from pctr.pod_session import run_session

    args = context.args
    words = args.words[1:] if args.words[:1] == ["--"] else args.words
    if not words:
        raise UsageError("which command? see 'pctr pod exec --help'")
    request = ExecRequest(
        container_id=_container(context), cmd=words, tty=args.tty, stdin=args.interactive, stdout=True,
        stderr=not args.tty,
    )
    answer = context.client.unary(CRI_RUNTIME + "Exec", request, UrlResponse, timeout=30)
    return run_session(answer.url, stdin=args.interactive, tty=args.tty, detachable=False)


def run_attach(context: Context) -> int:
    """Join the streams of a pod's container."""
    from pctr.pod_session import run_session

    args = context.args
    request = AttachRequest(
        container_id=_container(context), stdin=args.interactive, tty=args.tty, stdout=True, stderr=not args.tty
    )
    answer = context.client.unary(CRI_RUNTIME + "Attach", request, UrlResponse, timeout=30)
    return run_session(answer.url, stdin=args.interactive, tty=args.tty, detachable=args.tty)


def parse_ports(words: list[str]) -> list[tuple[int, int]]:
    """(local, remote) of each `[LOCAL:]REMOTE`."""
    ports = []
    for word in words:
        local, colon, remote = word.rpartition(":")
        try:
            pair = (int(local or 0) if colon else int(remote), int(remote))
        except ValueError:
            raise UsageError(f"{word!r} is not [LOCAL:]REMOTE") from None
        if not 0 <= pair[0] < 65536 or not 0 < pair[1] < 65536:
            raise UsageError(f"{word!r} is not [LOCAL:]REMOTE")
        ports.append(pair)
    if not ports:
        raise UsageError("which ports? see 'pctr pod port-forward --help'")
    return ports


def run_port_forward(context: Context) -> int:
    """Listen on local ports and forward what connects into a pod, until interrupted."""
    from pctr import pods
    from pctr.pod_session import run_forward

    ports = parse_ports(context.args.words)
    pod = pods.find_pod(context.client, context.args.pod)

    def ask_url() -> str:
        request = PortForwardRequest(pod_sandbox_id=pod)
        return context.client.unary(CRI_RUNTIME + "PortForward", request, UrlResponse, timeout=30).url

    try:
        run_forward(ask_url, context.args.bind, ports)
    except KeyboardInterrupt:
        return 0
    raise Failed("the listening ports were closed")


COMMANDS = (
    Command("exec", "run a command in a pod's container", "pctr pod exec -it dns sh", _exec_arguments, run_exec),
    Command(
        "attach", "join the streams of a pod's container (ctrl-p ctrl-q leaves a terminal)",
        "pctr pod attach -it shell", _attach_arguments, run_attach,
    ),
    Command(
        "port-forward", "forward local ports into a pod", "pctr pod port-forward kube-system/dns 8053:53",
        _forward_arguments, run_port_forward,
    ),
)
