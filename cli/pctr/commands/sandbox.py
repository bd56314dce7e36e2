"""`pctr sandbox`: sandboxes of the native API (a kubelet's pods are under `pctr pod`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pctr import output
from pctr.command import Command, Context, document_option, filters_argument, format_option, label_option, parse_labels
from supervisord_ctr import errors

if TYPE_CHECKING:
    from pctr.command import Arguments


def _list_arguments(parser: Arguments) -> None:
    format_option(parser, "ids")
    filters_argument(parser)


def _list(context: Context) -> None:
    from pctr.rpc import SANDBOX_STORE
    from supervisord_ctr.api.services.sandbox.v1 import sandbox_pb2

    table = output.Table("ID", "RUNTIME", "SANDBOXER", "CREATED", "LABELS")
    response = context.client.unary(
        SANDBOX_STORE + "List", sandbox_pb2.StoreListRequest(filters=context.args.filters),
        sandbox_pb2.StoreListResponse,
    )
    for sandbox in sorted(response.list, key=lambda sandbox: sandbox.sandbox_id):
        table.add(sandbox.sandbox_id, sandbox.runtime.name, sandbox.sandboxer, output.age(sandbox.created_at),
                  output.labels(sandbox.labels.items()))
    table.show(context.args)


def _run_arguments(parser: Arguments) -> None:
    parser.add_argument("--runtime", default="io.containerd.runc.v2", metavar="NAME", help="runtime of the sandbox")
    parser.add_argument("--sandboxer", default="shim", metavar="NAME", help="controller (default: shim)")
    label_option(parser, "label of the sandbox")
    parser.add_argument("id", metavar="ID")


def _run(context: Context) -> None:
    from pctr.rpc import SANDBOX_CONTROLLER, SANDBOX_STORE
    from supervisord_ctr.api.services.sandbox.v1 import sandbox_pb2
    from supervisord_ctr.api.types import types_pb2

    args, client = context.args, context.client
    sandbox = types_pb2.Sandbox(
        sandbox_id=args.id, runtime=types_pb2.Sandbox.Runtime(name=args.runtime), sandboxer=args.sandboxer,
        labels=parse_labels(args.label),
    )
    client.unary(
        SANDBOX_STORE + "Create", sandbox_pb2.StoreCreateRequest(sandbox=sandbox), sandbox_pb2.StoreCreateResponse)
    try:
        client.unary(
            SANDBOX_CONTROLLER + "Create", sandbox_pb2.ControllerCreateRequest(
                sandbox_id=args.id, sandbox=sandbox, sandboxer=args.sandboxer), sandbox_pb2.ControllerCreateResponse)
        client.unary(
            SANDBOX_CONTROLLER + "Start", sandbox_pb2.ControllerStartRequest(
                sandbox_id=args.id, sandboxer=args.sandboxer), sandbox_pb2.ControllerStartResponse)
    except errors.Error:
        client.unary(SANDBOX_STORE + "Delete", sandbox_pb2.StoreDeleteRequest(sandbox_id=args.id),
                     sandbox_pb2.StoreDeleteResponse)
        raise
    print(args.id)


def _info_arguments(parser: Arguments) -> None:
    document_option(parser)
    parser.add_argument("id", metavar="ID")


def _info(context: Context) -> None:
    from pctr.rpc import SANDBOX_CONTROLLER, SANDBOX_STORE
    from supervisord_ctr.api.services.sandbox.v1 import sandbox_pb2

    client, name = context.client, context.args.id
    record = client.unary(
        SANDBOX_STORE + "Get", sandbox_pb2.StoreGetRequest(sandbox_id=name), sandbox_pb2.StoreGetResponse).sandbox
    status = client.unary(
        SANDBOX_CONTROLLER + "Status", sandbox_pb2.ControllerStatusRequest(
            sandbox_id=name, sandboxer=record.sandboxer, verbose=True), sandbox_pb2.ControllerStatusResponse)
    output.document({
        "id": record.sandbox_id, "runtime": record.runtime.name, "sandboxer": record.sandboxer,
        "labels": dict(record.labels), "created_at": output.moment(record.created_at).raw, "pid": status.pid,
        "state": status.state, "address": status.address, "info": dict(status.info),
    })


def _remove_arguments(parser: Arguments) -> None:
    parser.add_argument("-f", "--force", action="store_true", help="stop what still runs")
    parser.add_argument("ids", nargs="+", metavar="ID")


def _remove(context: Context) -> int:
    from pctr.rpc import SANDBOX_CONTROLLER, SANDBOX_STORE
    from supervisord_ctr.api.services.sandbox.v1 import sandbox_pb2

    client, status = context.client, 0
    for name in context.args.ids:
        try:
            record = client.unary(
                SANDBOX_STORE + "Get", sandbox_pb2.StoreGetRequest(sandbox_id=name), sandbox_pb2.StoreGetResponse)
            sandboxer = record.sandbox.sandboxer
            try:
                client.unary(SANDBOX_CONTROLLER + "Stop", sandbox_pb2.ControllerStopRequest(
                    sandbox_id=name, sandboxer=sandboxer), sandbox_pb2.ControllerStopResponse)
                client.unary(SANDBOX_CONTROLLER + "Shutdown", sandbox_pb2.ControllerShutdownRequest(
                    sandbox_id=name, sandboxer=sandboxer), sandbox_pb2.ControllerShutdownResponse)
            except errors.NotFound:
                pass
            except errors.Error:
                if not context.args.force:
                    raise
            client.unary(SANDBOX_STORE + "Delete", sandbox_pb2.StoreDeleteRequest(sandbox_id=name),
                         sandbox_pb2.StoreDeleteResponse)
            print(name)
        except errors.Error as error:
            output.warn(str(error))
            status = 1
    return status


COMMANDS = (
    Command("ls", "list sandboxes", "pctr sandbox ls", _list_arguments, _list, ("list",)),
    Command("run", "create and start a sandbox", "pctr sandbox run web", _run_arguments, _run, ("create", "c", "r")),
    Command("info", "describe a sandbox as JSON", "pctr sandbox info web", _info_arguments, _info, ("inspect",)),
    Command("rm", "stop and remove sandboxes", "pctr sandbox rm web", _remove_arguments, _remove,
            ("remove", "delete", "del")),
)
