"""`pctr pod`: a kubelet's pods, over CRI."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from pctr import output
from pctr.command import Command, Context, Failed, document_option, format_option, parse_duration
from pctr.commands.pod_stream import COMMANDS as STREAM_COMMANDS
from supervisord_ctr import errors

if TYPE_CHECKING:
    from pctr.command import Arguments


def _list_arguments(parser: Arguments) -> None:
    format_option(parser, "ids")
    parser.add_argument("-c", "--containers", action="store_true", help="list the containers of pods instead")


def _list(context: Context) -> None:
    from pctr import pods

    client, now = context.client, time.time()
    listed = pods.list_pods(client)
    if context.args.containers:
        names = {pod.id: f"{pod.metadata.namespace}/{pod.metadata.name}" for pod in listed}
        table = output.Table("CONTAINER", "NAME", "ATTEMPT", "STATE", "AGE", "IMAGE", "POD", quiet="CONTAINER")
        for entry in pods.list_containers(client):
            table.add(
                entry.id, entry.metadata.name, entry.metadata.attempt, pods.CONTAINER_STATES.get(entry.state),
                pods.nanoseconds_age(entry.created_at, now), entry.image.user_specified_image or entry.image.image,
                names.get(entry.pod_sandbox_id, entry.pod_sandbox_id),
            )
    else:
        table = output.Table("POD", "NAMESPACE", "NAME", "ATTEMPT", "STATE", "AGE", "RUNTIME", quiet="POD")
        for pod in listed:
            table.add(
                pod.id, pod.metadata.namespace, pod.metadata.name, pod.metadata.attempt,
                pods.POD_STATES.get(pod.state), pods.nanoseconds_age(pod.created_at, now), pod.runtime_handler,
            )
    table.show(context.args)


def _inspect_arguments(parser: Arguments) -> None:
    document_option(parser)
    parser.add_argument("names", nargs="+", metavar="POD|CONTAINER", help="id, beginning of an id, or name")


def _inspect(context: Context) -> None:
    from google.protobuf.json_format import MessageToDict

    from pctr import pods

    documents: list[dict[str, Any]] = []
    for name in context.args.names:
        try:
            pod = pods.find_pod(context.client, name)
        except errors.NotFound:
            found = pods.find_container(context.client, name)
            status: Any = pods.container_status(context.client, found.id)
        else:
            status = pods.pod_status(context.client, pod)
        documents.append({
            "status": MessageToDict(status.status, preserving_proto_field_name=True),
            "info": pods.verbose(status.info),
        })
    output.document(documents)


def _stop_arguments(parser: Arguments) -> None:
    parser.add_argument("pods", nargs="+", metavar="POD")


def _stop(context: Context) -> int:
    from pctr import pods
    from pctr.rpc import CRI_RUNTIME
    from supervisord_ctr.api.cri.v1 import cri_pb2

    status = 0
    for name in context.args.pods:
        try:
            pod = pods.find_pod(context.client, name)
            context.client.unary(
                CRI_RUNTIME + "StopPodSandbox", cri_pb2.StopPodSandboxRequest(pod_sandbox_id=pod),
                cri_pb2.StopPodSandboxResponse,
            )
            print(pod)
        except (errors.Error, Failed) as error:
            output.warn(str(error))
            status = 1
    return status


def _remove_arguments(parser: Arguments) -> None:
    parser.add_argument("-f", "--force", action="store_true", help="also pods that are ready")
    parser.add_argument("pods", nargs="+", metavar="POD")


def _remove(context: Context) -> int:
    from pctr import pods
    from pctr.rpc import CRI_RUNTIME
    from supervisord_ctr.api.cri.v1 import cri_pb2

    status = 0
    for name in context.args.pods:
        try:
            pod = pods.find_pod(context.client, name)
            if not context.args.force and pods.pod_status(context.client, pod).status.state == cri_pb2.SANDBOX_READY:
                raise Failed(f"pod {name}: is ready; stop it first, or use --force")
            context.client.unary(
                CRI_RUNTIME + "RemovePodSandbox", cri_pb2.RemovePodSandboxRequest(pod_sandbox_id=pod),
                cri_pb2.RemovePodSandboxResponse,
            )
            print(pod)
        except (errors.Error, Failed) as error:
            output.warn(str(error))
            status = 1
    return status


def _logs_arguments(parser: Arguments) -> None:
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the container ends")
    parser.add_argument("--tail", type=int, default=-1, metavar="N", help="only the last N lines")
    parser.add_argument("--since", default="", metavar="SPAN", help="only lines not older than that, such as 10m")
    parser.add_argument("-t", "--timestamps", action="store_true", help="show when each line was written")
    parser.add_argument("container", metavar="CONTAINER", help="id, beginning of an id, or name")


def _logs(context: Context) -> None:
    from pctr.pod_logs import show_logs

    since = time.time() - parse_duration(context.args.since) if context.args.since else 0.0
    show_logs(context, since)


def _stats_arguments(parser: Arguments) -> None:
    format_option(parser)
    parser.add_argument("pods", nargs="*", metavar="POD", help="pods (default: all)")


def _stats(context: Context) -> None:
    from pctr import pods
    from pctr.rpc import CRI_RUNTIME
    from supervisord_ctr.api.cri.v1 import cri_pb2

    client = context.client
    wanted = [pods.find_pod(client, name) for name in context.args.pods]
    response = client.unary(
        CRI_RUNTIME + "ListPodSandboxStats", cri_pb2.ListPodSandboxStatsRequest(),
        cri_pb2.ListPodSandboxStatsResponse,
    )
    table = output.Table("POD", "NAME", "CONTAINER", "CPU", "MEMORY", "PROCESSES", "RX", "TX", right=("CPU",))
    for pod in response.stats:
        if wanted and pod.attributes.id not in wanted:
            continue
        metadata = pod.attributes.metadata
        name = f"{metadata.namespace}/{metadata.name}"
        network = pod.linux.network.default_interface
        table.add(
            pod.attributes.id, name, None, _cpu(pod.linux.cpu), output.size(pod.linux.memory.working_set_bytes.value),
            pod.linux.process.process_count.value, output.size(network.rx_bytes.value),
            output.size(network.tx_bytes.value),
        )
        for entry in pod.linux.containers:
            table.add(
                pod.attributes.id, name, entry.attributes.metadata.name, _cpu(entry.cpu),
                output.size(entry.memory.working_set_bytes.value), None, None, None,
            )
    table.show(context.args)


def _cpu(usage: Any) -> output.Cell:
    """Thousandths of a CPU right now; JSON has them, too."""
    if not usage.HasField("usage_nano_cores"):
        return output.Cell(None, "-")
    share = round(usage.usage_nano_cores.value / 1e6, 1)
    return output.Cell(share, f"{share:.1f}m")


COMMANDS = (
    Command("ls", "list pods", "pctr pod ls\npctr pod ls --containers", _list_arguments, _list, ("list",)),
    Command("inspect", "describe pods or their containers as JSON", "pctr pod inspect kube-system/dns",
            _inspect_arguments, _inspect, ("info",)),
    Command("stop", "stop pods", "pctr pod stop kube-system/dns", _stop_arguments, _stop),
    Command("rm", "remove pods", "pctr pod rm --force kube-system/dns", _remove_arguments, _remove,
            ("remove", "delete", "del")),
    Command("logs", "print the log of a pod's container", "pctr pod logs --follow --tail 20 dns", _logs_arguments,
            _logs),
    Command("stats", "show what pods use", "pctr pod stats", _stats_arguments, _stats),
    *STREAM_COMMANDS,
)
