"""Pods and containers through CRI: requests with the fields that a kubelet sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from supervisord_ctr.api.cri.v1 import cri_pb2
from tests.bench.client import Client
from tests.bench.waiting import wait_until


def _namespaces(*, host_network: bool) -> Any:
    """What a kubelet says of namespaces, of the pod and of every container in it: processes are not shared."""
    mode = cri_pb2.NODE if host_network else cri_pb2.POD
    return cri_pb2.NamespaceOption(network=mode, pid=cri_pb2.CONTAINER, ipc=cri_pb2.POD)


def pod_config(name: str, logs: Path, cgroup: str, *, host_network: bool) -> Any:
    """Configuration of one pod."""
    options = _namespaces(host_network=host_network)
    return cri_pb2.PodSandboxConfig(
        metadata=cri_pb2.PodSandboxMetadata(name=name, uid=f"uid-{name}", namespace="bench", attempt=0),
        hostname="" if host_network else name[:63], log_directory=str(logs / name), labels={"app": "bench"},
        linux=cri_pb2.LinuxPodSandboxConfig(
            cgroup_parent=f"{cgroup}/{name}",
            security_context=cri_pb2.LinuxSandboxSecurityContext(namespace_options=options)))


def container_config(name: str, image: str, command: list[str], *, host_network: bool) -> Any:
    """Configuration of one container."""
    context = cri_pb2.LinuxContainerSecurityContext(namespace_options=_namespaces(host_network=host_network))
    return cri_pb2.ContainerConfig(
        metadata=cri_pb2.ContainerMetadata(name=name, attempt=0), image=cri_pb2.ImageSpec(image=image), command=command,
        log_path=f"{name}.log", labels={"app": "bench"},
        linux=cri_pb2.LinuxContainerConfig(
            resources=cri_pb2.LinuxContainerResources(cpu_shares=2, oom_score_adj=1000), security_context=context))


class Pod:
    """One pod on one daemon."""

    def __init__(self, client: Client, name: str, logs: Path, cgroup: str, *, host_network: bool) -> None:
        self._runtime = client.runtime
        self._host_network = host_network
        (logs / name).mkdir(parents=True, exist_ok=True)
        self.config = pod_config(name, logs, cgroup, host_network=host_network)
        self.id = str(self._runtime.RunPodSandbox(cri_pb2.RunPodSandboxRequest(config=self.config),
                                                  timeout=120).pod_sandbox_id)

    def create(self, name: str, image: str, command: list[str]) -> str:
        """Create a container; its id."""
        config = container_config(name, image, command, host_network=self._host_network)
        request = cri_pb2.CreateContainerRequest(pod_sandbox_id=self.id, sandbox_config=self.config, config=config)
        return str(self._runtime.CreateContainer(request, timeout=120).container_id)

    def start(self, container: str) -> None:
        """Start a container and return when its status says that it runs."""
        self._runtime.StartContainer(cri_pb2.StartContainerRequest(container_id=container), timeout=120)
        wait_until(lambda: self.status(container).status.state == cri_pb2.CONTAINER_RUNNING, f"{container} to run")

    def status(self, container: str) -> Any:
        """Answer of ContainerStatus."""
        return self._runtime.ContainerStatus(cri_pb2.ContainerStatusRequest(container_id=container), timeout=60)

    def stop_container(self, container: str) -> None:
        """Kill a container at once."""
        self._runtime.StopContainer(cri_pb2.StopContainerRequest(container_id=container, timeout=0), timeout=120)

    def remove_container(self, container: str) -> None:
        """Remove a container."""
        self._runtime.RemoveContainer(cri_pb2.RemoveContainerRequest(container_id=container), timeout=120)

    def stop(self) -> None:
        """Stop the pod."""
        self._runtime.StopPodSandbox(cri_pb2.StopPodSandboxRequest(pod_sandbox_id=self.id), timeout=120)

    def remove(self) -> None:
        """Remove the pod with everything in it."""
        self._runtime.RemovePodSandbox(cri_pb2.RemovePodSandboxRequest(pod_sandbox_id=self.id), timeout=120)


def remove_all(client: Client) -> None:
    """Stop and remove every pod of the daemon."""
    for item in client.runtime.ListPodSandbox(cri_pb2.ListPodSandboxRequest(), timeout=60).items:
        client.runtime.StopPodSandbox(cri_pb2.StopPodSandboxRequest(pod_sandbox_id=item.id), timeout=120)
        client.runtime.RemovePodSandbox(cri_pb2.RemovePodSandboxRequest(pod_sandbox_id=item.id), timeout=120)
