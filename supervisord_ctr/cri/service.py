"""The gRPC face of RuntimeService: 37 methods that hand over to the concern they belong to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from supervisord_ctr import errors
from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.api.cri.v1.cri_pb2_grpc import RuntimeServiceServicer
from supervisord_ctr.cri import (
    checkpoint,
    container_create,
    container_remove,
    container_report,
    container_start,
    container_stop,
    container_update,
    exec_process,
    exec_sync,
    metric_names,
    metrics,
    pods_run,
    pods_stop,
    stats,
    status,
)
from supervisord_ctr.cri.core import Core
from supervisord_ctr.streaming import AttachParams, ExecParams, PortForwardParams, Urls


class RuntimeService(RuntimeServiceServicer):
    """Pods and containers for a kubelet."""

    def __init__(self, core: Core, urls: Urls) -> None:
        self._core = core
        self._urls = urls

    async def Version(self, request: pb.VersionRequest, context: Any) -> pb.VersionResponse:
        return status.version()

    async def Status(self, request: pb.StatusRequest, context: Any) -> pb.StatusResponse:
        return await status.status(self._core, request.verbose)

    async def RuntimeConfig(self, request: pb.RuntimeConfigRequest, context: Any) -> pb.RuntimeConfigResponse:
        return status.runtime_config(self._core)

    async def UpdateRuntimeConfig(
        self, request: pb.UpdateRuntimeConfigRequest, context: Any
    ) -> pb.UpdateRuntimeConfigResponse:
        # The network plugins have their own configuration: the node's range is for them to know.
        return pb.UpdateRuntimeConfigResponse()

    # -- pods ----------------------------------------------------------------------------------------

    async def RunPodSandbox(self, request: pb.RunPodSandboxRequest, context: Any) -> pb.RunPodSandboxResponse:
        return pb.RunPodSandboxResponse(pod_sandbox_id=await pods_run.run_pod(self._core, request))

    async def StopPodSandbox(self, request: pb.StopPodSandboxRequest, context: Any) -> pb.StopPodSandboxResponse:
        await pods_stop.stop_pod(self._core, request.pod_sandbox_id)
        return pb.StopPodSandboxResponse()

    async def RemovePodSandbox(self, request: pb.RemovePodSandboxRequest, context: Any) -> pb.RemovePodSandboxResponse:
        await pods_stop.remove_pod(self._core, request.pod_sandbox_id)
        return pb.RemovePodSandboxResponse()

    async def PodSandboxStatus(self, request: pb.PodSandboxStatusRequest, context: Any) -> pb.PodSandboxStatusResponse:
        pod = self._core.state.pod(request.pod_sandbox_id)
        return pb.PodSandboxStatusResponse(
            status=pod.status(), info=container_report.pod_info(self._core, pod) if request.verbose else None
        )

    async def ListPodSandbox(self, request: pb.ListPodSandboxRequest, context: Any) -> pb.ListPodSandboxResponse:
        return pb.ListPodSandboxResponse(items=container_report.list_pods(self._core, request.filter))

    async def StreamPodSandboxes(
        self, request: pb.StreamPodSandboxesRequest, context: Any
    ) -> AsyncIterator[pb.StreamPodSandboxesResponse]:
        for page in container_report.pages(container_report.list_pods(self._core, request.filter)):
            yield pb.StreamPodSandboxesResponse(pod_sandboxes=page)

    async def UpdatePodSandboxResources(
        self, request: pb.UpdatePodSandboxResourcesRequest, context: Any
    ) -> pb.UpdatePodSandboxResourcesResponse:
        await container_update.update_pod_resources(self._core, request)
        return pb.UpdatePodSandboxResourcesResponse()

    # -- containers ----------------------------------------------------------------------------------

    async def CreateContainer(self, request: pb.CreateContainerRequest, context: Any) -> pb.CreateContainerResponse:
        return pb.CreateContainerResponse(container_id=await container_create.create_container(self._core, request))

    async def StartContainer(self, request: pb.StartContainerRequest, context: Any) -> pb.StartContainerResponse:
        await container_start.start_container(self._core, request.container_id)
        return pb.StartContainerResponse()

    async def StopContainer(self, request: pb.StopContainerRequest, context: Any) -> pb.StopContainerResponse:
        await container_stop.stop_container(self._core, request.container_id, request.timeout)
        return pb.StopContainerResponse()

    async def RemoveContainer(self, request: pb.RemoveContainerRequest, context: Any) -> pb.RemoveContainerResponse:
        await container_remove.remove_container(self._core, request.container_id)
        return pb.RemoveContainerResponse()

    async def ListContainers(self, request: pb.ListContainersRequest, context: Any) -> pb.ListContainersResponse:
        return pb.ListContainersResponse(containers=container_report.list_containers(self._core, request.filter))

    async def StreamContainers(
        self, request: pb.StreamContainersRequest, context: Any
    ) -> AsyncIterator[pb.StreamContainersResponse]:
        for page in container_report.pages(container_report.list_containers(self._core, request.filter)):
            yield pb.StreamContainersResponse(containers=page)

    async def ContainerStatus(self, request: pb.ContainerStatusRequest, context: Any) -> pb.ContainerStatusResponse:
        container = self._core.state.container(request.container_id)
        return pb.ContainerStatusResponse(
            status=container_report.container_status(self._core, container),
            info=await container_report.container_info(self._core, container) if request.verbose else None,
        )

    async def UpdateContainerResources(
        self, request: pb.UpdateContainerResourcesRequest, context: Any
    ) -> pb.UpdateContainerResourcesResponse:
        await container_update.update_resources(self._core, request)
        return pb.UpdateContainerResourcesResponse()

    async def ReopenContainerLog(
        self, request: pb.ReopenContainerLogRequest, context: Any
    ) -> pb.ReopenContainerLogResponse:
        await container_update.reopen_log(self._core, request.container_id)
        return pb.ReopenContainerLogResponse()

    # -- streams -------------------------------------------------------------------------------------

    async def ExecSync(self, request: pb.ExecSyncRequest, context: Any) -> pb.ExecSyncResponse:
        return await exec_sync.exec_sync(self._core, request)

    async def Exec(self, request: pb.ExecRequest, context: Any) -> pb.ExecResponse:
        params = ExecParams(
            request.container_id, tuple(request.cmd), request.tty, request.stdin, request.stdout, request.stderr
        )
        params.validate()
        exec_process.running_container(self._core, request.container_id)
        return pb.ExecResponse(url=self._urls.exec_url(params))

    async def Attach(self, request: pb.AttachRequest, context: Any) -> pb.AttachResponse:
        params = AttachParams(request.container_id, request.tty, request.stdin, request.stdout, request.stderr)
        params.validate()
        exec_process.running_container(self._core, request.container_id)
        return pb.AttachResponse(url=self._urls.attach_url(params))

    async def PortForward(self, request: pb.PortForwardRequest, context: Any) -> pb.PortForwardResponse:
        params = PortForwardParams(request.pod_sandbox_id, tuple(request.port))
        params.validate()
        pod = self._core.state.pod(request.pod_sandbox_id)
        if not pod.ready:
            raise errors.FailedPrecondition(f"sandbox container {pod.id!r} is not running", kind="sandbox", key=pod.id)
        return pb.PortForwardResponse(url=self._urls.port_forward_url(params))

    # -- stats, metrics, events ----------------------------------------------------------------------

    async def ContainerStats(self, request: pb.ContainerStatsRequest, context: Any) -> pb.ContainerStatsResponse:
        return pb.ContainerStatsResponse(stats=await stats.one_container(self._core, request.container_id))

    async def ListContainerStats(
        self, request: pb.ListContainerStatsRequest, context: Any
    ) -> pb.ListContainerStatsResponse:
        return pb.ListContainerStatsResponse(stats=await stats.list_containers(self._core, request.filter))

    async def StreamContainerStats(
        self, request: pb.StreamContainerStatsRequest, context: Any
    ) -> AsyncIterator[pb.StreamContainerStatsResponse]:
        for page in container_report.pages(await stats.list_containers(self._core, request.filter)):
            yield pb.StreamContainerStatsResponse(container_stats=page)

    async def PodSandboxStats(self, request: pb.PodSandboxStatsRequest, context: Any) -> pb.PodSandboxStatsResponse:
        return pb.PodSandboxStatsResponse(stats=await stats.one_pod(self._core, request.pod_sandbox_id))

    async def ListPodSandboxStats(
        self, request: pb.ListPodSandboxStatsRequest, context: Any
    ) -> pb.ListPodSandboxStatsResponse:
        return pb.ListPodSandboxStatsResponse(stats=await stats.list_pods(self._core, request.filter))

    async def StreamPodSandboxStats(
        self, request: pb.StreamPodSandboxStatsRequest, context: Any
    ) -> AsyncIterator[pb.StreamPodSandboxStatsResponse]:
        for page in container_report.pages(await stats.list_pods(self._core, request.filter)):
            yield pb.StreamPodSandboxStatsResponse(pod_sandbox_stats=page)

    async def ListMetricDescriptors(
        self, request: pb.ListMetricDescriptorsRequest, context: Any
    ) -> pb.ListMetricDescriptorsResponse:
        return pb.ListMetricDescriptorsResponse(descriptors=metric_names.descriptors())

    async def ListPodSandboxMetrics(
        self, request: pb.ListPodSandboxMetricsRequest, context: Any
    ) -> pb.ListPodSandboxMetricsResponse:
        return pb.ListPodSandboxMetricsResponse(pod_metrics=await metrics.list_metrics(self._core))

    async def StreamPodSandboxMetrics(
        self, request: pb.StreamPodSandboxMetricsRequest, context: Any
    ) -> AsyncIterator[pb.StreamPodSandboxMetricsResponse]:
        for page in container_report.pages(await metrics.list_metrics(self._core), 20):
            yield pb.StreamPodSandboxMetricsResponse(pod_sandbox_metrics=page)

    async def GetContainerEvents(
        self, request: pb.GetEventsRequest, context: Any
    ) -> AsyncIterator[pb.ContainerEventResponse]:
        # The headers tell the client that it listens: what happens after it has them reaches it.
        async for event in self._core.events.listen(lambda: context.send_initial_metadata(())):
            yield event

    # -- checkpoints ---------------------------------------------------------------------------------

    async def CheckpointContainer(
        self, request: pb.CheckpointContainerRequest, context: Any
    ) -> pb.CheckpointContainerResponse:
        await checkpoint.checkpoint_container(self._core, request)
        return pb.CheckpointContainerResponse()

    async def CheckpointPod(self, request: pb.CheckpointPodRequest, context: Any) -> pb.CheckpointPodResponse:
        raise errors.Unimplemented("pods cannot be checkpointed; checkpoint their containers", kind="checkpoint")

    async def RestorePod(self, request: pb.RestorePodRequest, context: Any) -> pb.RestorePodResponse:
        raise errors.Unimplemented("pods cannot be restored; create containers from checkpoints", kind="checkpoint")
