"""What the runtime says of itself: version, conditions, handlers, features, cgroup driver."""

from __future__ import annotations

import dataclasses
import json
import platform
from typing import Any

from supervisord_ctr import __version__, errors
from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.cri import selinux_labels
from supervisord_ctr.cri.container_create import features
from supervisord_ctr.cri.core import Core
from supervisord_ctr.linux import cgroups
from supervisord_ctr.oci import apparmor, selinux

#: Version of the kubelet's side of the interface, and of CRI.
_KUBE_API, _CRI_API = "0.1.0", "v1"


def version() -> pb.VersionResponse:
    """Name and versions."""
    return pb.VersionResponse(
        version=_KUBE_API, runtime_name="supervisord-ctr", runtime_version=__version__, runtime_api_version=_CRI_API
    )


async def status(core: Core, verbose: bool) -> pb.StatusResponse:
    """Conditions, and what each handler can do; with `verbose` the settings, the networks and what runs now."""
    reason = await core.networks.status()
    conditions = [
        pb.RuntimeCondition(type="RuntimeReady", status=True),
        pb.RuntimeCondition(
            type="NetworkReady", status=not reason, reason="NetworkPluginNotReady" if reason else "",
            message=f"Network plugin returns error: {reason}" if reason else "",
        ),
    ]
    able = features(core.root)
    handler_features = pb.RuntimeHandlerFeatures(
        recursive_read_only_mounts=able.recursive_read_only, user_namespaces=able.idmap
    )
    response = pb.StatusResponse(
        status=pb.RuntimeStatus(conditions=conditions),
        features=pb.RuntimeFeatures(
            supplemental_groups_policy=True, user_namespaces_host_network=able.idmap, mount_options=True
        ),
    )
    for name in ("", *sorted(core.settings.runtime.classes)):
        response.runtime_handlers.append(pb.RuntimeHandler(name=name, features=handler_features))
    if verbose:
        for key, value in _information(core, reason).items():
            response.info[key] = json.dumps(value)
    return response


def _information(core: Core, reason: str) -> dict[str, Any]:
    try:
        networks: list[dict[str, Any]] = [network.to_json() for network in core.networks.plugins.networks()]
    except errors.Error:
        networks = []
    return {
        "config": _settings(core),
        "runtimes": {name: dataclasses.asdict(value) for name, value in core.settings.runtime.classes.items()},
        "cniconfig": {"networks": networks}, "lastCNILoadStatus": reason or "OK",
        "host": {
            "cgroups": cgroups.hierarchy().mode, "apparmor": apparmor.enabled(),
            "selinux": selinux.enabled(), "kernel": platform.release(),
            "python": platform.python_version(),
        },
        "operations": core.stages.all(),
        "counts": {
            "sandboxes": len(list(core.state.pods())), "containers": len(list(core.state.containers())),
            "images": len(core.images.all()),
        },
    }


def _settings(core: Core) -> dict[str, Any]:
    """Our settings, and under the names of containerd's those that tools read from `crictl info`."""
    cri = core.settings.cri
    runtimes = {
        name: {
            "runtimeType": found.type, "snapshotter": found.snapshotter,
            "options": {"BinaryName": found.binary, "Root": found.root, "SystemdCgroup": core.systemd_cgroups(name)},
            "privilegedWithoutHostDevices": found.privileged_without_host_devices,
        }
        for name, found in core.settings.runtime.classes.items()
    }
    return {
        **dataclasses.asdict(cri),
        "containerd": {"defaultRuntimeName": core.settings.runtime.default, "runtimes": runtimes},
        "cni": {**dataclasses.asdict(cri.cni), "binDirs": cri.cni.bin_dirs, "confDir": cri.cni.conf_dir,
                "maxConfNum": cri.cni.max_conf_num},
        "maxContainerLogLineSize": cri.max_log_line, "enableCDI": True, "cdiSpecDirs": cri.cdi_dirs,
        "containerdEndpoint": core.settings.address, "containerdRootDir": core.settings.root,
        "rootDir": str(core.root), "stateDir": str(core.run), "enableSelinux": selinux_labels.in_force(core),
        "selinuxCategoryRange": cri.selinux_category_range,
        "drainExecSyncIOTimeout": f"{cri.drain_exec_io_timeout:g}s",
    }


def runtime_config(core: Core) -> pb.RuntimeConfigResponse:
    """The cgroup driver that a kubelet has to use."""
    systemd = core.systemd_cgroups("")
    return pb.RuntimeConfigResponse(linux=pb.LinuxRuntimeConfiguration(
        cgroup_driver=pb.SYSTEMD if systemd else pb.CGROUPFS
    ))
