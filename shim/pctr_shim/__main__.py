"""`containerd-shim-pctr-v1`: the shim as a foreign daemon starts it.

    containerd-shim-pctr-v1 -namespace NS -id ID -address ADDR -publish-binary BIN [-bundle DIR] [-debug] start
    containerd-shim-pctr-v1 … delete
    containerd-shim-pctr-v1 -info | -v

`start` runs in the bundle, prints how to reach the shim and leaves it running; containers with the same
group annotation share one. The answer has the form of the question:

- bootstrap parameters on standard input (containerd 2.3 and later): a BootstrapResult message;
- MAX_SHIM_VERSION of 3 or more in the environment: JSON with version, address and protocol;
- else the address alone, which every containerd understands.

Two settings come by the environment, for daemons that keep their state elsewhere: PCTR_SHIM_SOCKETS (folder of
the sockets, default /run/containerd/s) and PCTR_SHIM_RUNTIME_ROOT (state of the OCI runtime, default
/run/containerd/runc; the namespace is appended).

`delete` takes away what a dead shim left and prints a DeleteResponse. `-info` prints a RuntimeInfo.
Owns nothing of the shim itself: that is `serve`.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pctr_shim import lean as lean

if TYPE_CHECKING:
    from supervisord_ctr.api.runc.v1.options_pb2 import Options
    from supervisord_ctr.api.runtime.bootstrap.v1.bootstrap_pb2 import BootstrapParams

DEFAULT_SOCKETS = "/run/containerd/s"
_GROUPS = ("io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id")
_STDIN_LIMIT = 10 << 20


@dataclass(slots=True)
class Arguments:
    """The command line, in Go's manner: one dash or two, value after a space or "="."""

    action: str = ""
    namespace: str = ""
    id: str = ""
    address: str = ""
    publish_binary: str = ""
    bundle: str = ""
    socket: str = ""
    debug: bool = False
    info: bool = False
    version: bool = False


def parse(words: list[str]) -> Arguments:
    """`SystemExit` with a message for what is not understood."""
    found = Arguments()
    switches = {"debug": "debug", "info": "info", "v": "version", "version": "version"}
    values = {"namespace", "id", "address", "publish-binary", "bundle", "socket", "debug-socket"}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            found.action = word
            break
        name, equals, value = word.lstrip("-").partition("=")
        if name in switches:
            setattr(found, switches[name], value not in ("false", "0"))
        elif name in values:
            if not equals:
                if not rest:
                    raise SystemExit(f"containerd-shim-pctr-v1: -{name} needs a value")
                value = rest.pop(0)
            if name != "debug-socket":
                setattr(found, name.replace("-", "_"), value)
        else:
            raise SystemExit(f"containerd-shim-pctr-v1: unknown flag {word}")
    return found


def main() -> None:
    """Entry point."""
    arguments = parse(sys.argv[1:])
    if arguments.version:
        from pctr_shim import __version__

        print(f"containerd-shim-pctr-v1:\n  Version:  {__version__}")
        return
    if arguments.info:
        _info()
        return
    if not arguments.namespace:
        raise SystemExit("containerd-shim-pctr-v1: shim namespace cannot be empty")
    if not arguments.id:
        raise SystemExit("containerd-shim-pctr-v1: shim id cannot be empty")
    try:
        if arguments.action == "start":
            os.closerange(3, 1 << 16)  # what was inherited must not reach a container (S3)
            _start(arguments)
        elif arguments.action == "delete":
            _delete(arguments)
        else:
            _serve_here(arguments)
    except OSError as error:
        raise SystemExit(f"containerd-shim-pctr-v1: {error}") from error


def group_of(arguments: Arguments) -> str:
    """The group that the bundle's annotations name (a pod's sandbox), else the container itself."""
    try:
        with open("config.json", "rb") as file:
            annotations = json.load(file).get("annotations") or {}
    except (OSError, ValueError) as error:
        raise SystemExit(f"containerd-shim-pctr-v1: reading config.json of {arguments.id}: {error}") from error
    return next((str(annotations[name]) for name in _GROUPS if name in annotations), arguments.id)


def socket_path(folder: str, address: str, namespace: str, group: str) -> str:
    """Where the group's shim listens: as containerd's shims name it, so that its tools find it."""
    text = os.path.join(address, namespace, group)
    return os.path.join(folder, hashlib.sha256(text.encode()).hexdigest())


def _start(arguments: Arguments) -> None:
    from google.protobuf.message import DecodeError

    from supervisord_ctr.api.runtime.bootstrap.v1 import bootstrap_pb2

    params = bootstrap_pb2.BootstrapParams()
    data = b"" if sys.stdin.isatty() else sys.stdin.buffer.read(_STDIN_LIMIT)
    modern = _parse_bootstrap(params, data, arguments)
    address = params.containerd_grpc_address or arguments.address
    group = group_of(arguments)
    folder = params.socket_dir or os.environ.get("PCTR_SHIM_SOCKETS") or DEFAULT_SOCKETS
    path = arguments.socket.removeprefix("unix://") or socket_path(folder, address, arguments.namespace, group)
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    from supervisord_ctr.ttrpc.server import listen

    try:
        listener = listen(path)
    except FileExistsError:
        _answer(path, modern)
        return
    with open("address", "w", encoding="utf-8") as file:
        file.write(f"unix://{path}")
    pid = _fork_shim(arguments, params, address, group, path, listener)
    try:
        _join(_options_of(params, data, modern).shim_cgroup, pid)
    except (OSError, DecodeError) as error:
        os.kill(pid, signal.SIGKILL)
        os.unlink(path)
        raise SystemExit(f"containerd-shim-pctr-v1: cgroup of the shim of {arguments.id}: {error}") from error
    _answer(path, modern)


def _options_of(params: BootstrapParams, data: bytes, modern: bool) -> Options:
    """The runtime options that come with the start: a parameter, or, before containerd 2.3, all of standard input."""
    from google.protobuf.any_pb2 import Any
    from google.protobuf.message import DecodeError

    from pctr_shim.values import type_name
    from supervisord_ctr.api.runc.v1 import options_pb2

    try:
        candidates = [extension.value for extension in params.extensions] if modern else [Any.FromString(data)]
    except DecodeError:
        return options_pb2.Options()  # something else, which others may understand
    for candidate in candidates:
        if type_name(candidate) == options_pb2.Options.DESCRIPTOR.full_name:
            return options_pb2.Options.FromString(candidate.value)
    return options_pb2.Options()


def _join(cgroup: str, pid: int) -> None:
    if cgroup:
        from supervisord_ctr.linux import cgroups

        cgroups.join(cgroups.folders_to_join(cgroup), pid)


def _parse_bootstrap(params: object, data: bytes, arguments: Arguments) -> bool:
    """Whether standard input holds bootstrap parameters for this very container.

    Older daemons put runtime options there, which may parse as parameters by accident: the identity tells.
    """
    from google.protobuf.message import DecodeError

    try:
        params.ParseFromString(data)  # type: ignore[attr-defined]
    except DecodeError:
        params.Clear()  # type: ignore[attr-defined]
        return False
    if getattr(params, "instance_id", "") == arguments.id and getattr(params, "namespace", "") == arguments.namespace:
        return True
    params.Clear()  # type: ignore[attr-defined]
    return False


def _answer(path: str, modern: bool) -> None:
    address = f"unix://{path}"
    if modern:
        from supervisord_ctr.api.runtime.bootstrap.v1 import bootstrap_pb2

        result = bootstrap_pb2.BootstrapResult(version=3, address=address, protocol="ttrpc")
        sys.stdout.buffer.write(result.SerializeToString())
    elif int(os.environ.get("MAX_SHIM_VERSION", "2") or "2") >= 3:
        sys.stdout.write(json.dumps({"version": 3, "address": address, "protocol": "ttrpc"}))
    else:
        sys.stdout.write(address)
    sys.stdout.flush()


def _fork_shim(
    arguments: Arguments, params: object, address: str, group: str, path: str, listener: socket.socket
) -> int:
    """Become two: the parent answers, the child is the shim. Nothing is executed a second time. The child's pid."""
    from pctr_shim import serve
    from pctr_shim.config import ShimConfig
    from supervisord_ctr.linux import processes

    config = ShimConfig(
        namespace=arguments.namespace, group=group, bundle=os.getcwd(), socket=path,
        events=getattr(params, "containerd_ttrpc_address", "") or os.environ.get("TTRPC_ADDRESS", ""),
        publish_binary=getattr(params, "containerd_binary", "") or arguments.publish_binary,
        address=address, debug=arguments.debug, runtime_root=_runtime_root(),
    )
    score = processes.read_oom_score_adj(os.getppid())
    pid = os.fork()  # noqa: TID251  the shim is this program, without a second start of the interpreter
    if pid:
        listener.close()
        return pid
    try:
        os.setsid()
        _own_streams()
        _configure_log(arguments.debug)
        processes.set_oom_score_adj(os.getpid(), score + 1)
        serve.run(config, listener)
    finally:
        os._exit(0)


def _own_streams() -> None:
    """Let go of the daemon's pipes: it waits for their end. The log goes to its fifo, if it reads one."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.close(null)
    try:
        log = os.open("log", os.O_RDWR | os.O_NONBLOCK | os.O_APPEND | os.O_CLOEXEC)
    except OSError:
        return
    os.dup2(log, 2)
    os.close(log)


def _configure_log(debug: bool) -> None:
    import logging

    text = 'time="%(asctime)s" level=%(levelname)s msg="%(message)s"'
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, format=text)
    logging.raiseExceptions = False
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def _serve_here(arguments: Arguments) -> None:
    """Without an action: serve on `-socket`, or on the listening socket that descriptor 3 is."""
    from pctr_shim import serve
    from pctr_shim.config import ShimConfig
    from supervisord_ctr.ttrpc.server import listen

    path = arguments.socket.removeprefix("unix://")
    listener = listen(path) if path else socket.socket(fileno=3)
    path = path or str(listener.getsockname())
    _configure_log(arguments.debug)
    serve.run(ShimConfig(
        namespace=arguments.namespace, group=arguments.id, bundle=os.getcwd(), socket=path,
        events=os.environ.get("TTRPC_ADDRESS", ""), publish_binary=arguments.publish_binary,
        address=arguments.address, debug=arguments.debug, runtime_root=_runtime_root(),
    ), listener)


def _runtime_root() -> str:
    from pctr_shim.config import FOREIGN_RUNTIME_ROOT

    return os.environ.get("PCTR_SHIM_RUNTIME_ROOT") or FOREIGN_RUNTIME_ROOT


def _delete(arguments: Arguments) -> None:
    from pctr_shim import cleanup
    from pctr_shim.values import timestamp
    from supervisord_ctr.api.runtime.task.v3 import task_pb2

    bundle = arguments.bundle or os.path.join(os.path.dirname(os.getcwd()), arguments.id)
    _remove_socket(bundle)
    record = cleanup.clean_up(arguments.namespace, arguments.id, bundle, "runc", _runtime_root())
    response = task_pb2.DeleteResponse(
        pid=record.pid, exit_status=record.exit_status, exited_at=timestamp(record.exited_at)
    )
    sys.stdout.buffer.write(response.SerializeToString())
    sys.stdout.flush()


def _remove_socket(bundle: str) -> None:
    """The dead shim's socket, unless a living one (a pod's) still listens there."""
    try:
        with open(os.path.join(bundle, "address"), encoding="utf-8") as file:
            path = file.read().strip().removeprefix("unix://")
    except OSError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        if path.startswith("/") and probe.connect_ex(path) != 0 and os.path.lexists(path):
            os.unlink(path)


def _info() -> None:
    from google.protobuf.any_pb2 import Any
    from google.protobuf.message import DecodeError

    from pctr_shim import __version__
    from pctr_shim.info import runtime_features
    from pctr_shim.values import type_name
    from supervisord_ctr.api.runc.v1 import options_pb2
    from supervisord_ctr.api.types import types_pb2

    data = b"" if sys.stdin.isatty() else sys.stdin.buffer.read(_STDIN_LIMIT)
    options, binary = Any(), "runc"
    try:
        options.ParseFromString(data)
        if type_name(options) == "containerd.runc.v1.Options":
            binary = options_pb2.Options.FromString(options.value).binary_name or binary
    except DecodeError as error:
        raise SystemExit(f"containerd-shim-pctr-v1: runtime options cannot be decoded: {error}") from error
    info = types_pb2.RuntimeInfo(
        name="io.containerd.pctr.v1", version=types_pb2.RuntimeVersion(version=__version__),
        options=options if data else None, features=runtime_features(binary),
    )
    sys.stdout.buffer.write(info.SerializeToString())
    sys.stdout.flush()


if __name__ == "__main__":
    main()
