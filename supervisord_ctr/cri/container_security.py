"""The security context of a container, as parts of its OCI specification.

Owns capabilities, privileged mode, seccomp, AppArmor, `no_new_privs`, masked and read-only paths; SELinux
labels are made elsewhere (`selinux_labels`). A profile that cannot be had is an error that names it; nothing
asked for is left out silently (D10).
"""

from __future__ import annotations

from supervisord_ctr import errors
from supervisord_ctr.api.cri.v1 import cri_pb2 as pb
from supervisord_ctr.names import check_line
from supervisord_ctr.oci import apparmor, capabilities, seccomp
from supervisord_ctr.oci.selinux import Labels
from supervisord_ctr.oci.spec import SpecBuilder

_POWERCAP = "/sys/devices/virtual/powercap"
_LOCALHOST = "localhost/"


def apply(
    builder: SpecBuilder, context: pb.LinuxContainerSecurityContext, pod: pb.LinuxSandboxSecurityContext,
    *, host_devices: bool, seccomp_default: bool, labels: Labels | None = None,
) -> None:
    """Everything but users, groups and namespaces. Call when mounts and devices are set."""
    if context.privileged and not pod.privileged:
        raise errors.InvalidArgument("no privileged container allowed in sandbox", kind="security context")
    _paths(builder, context)
    _capabilities(builder, context)
    if context.privileged:
        builder.with_privileged(host_devices=host_devices)
    builder.with_new_privileges(not context.no_new_privs)
    if context.readonly_rootfs:
        builder.with_root(readonly=True)
    _seccomp(builder, context, seccomp_default)
    _apparmor(builder, context)
    if labels is not None:
        builder.with_selinux(labels.process, labels.mount)


def _paths(builder: SpecBuilder, context: pb.LinuxContainerSecurityContext) -> None:
    """What the request masks, since an empty list is how Kubernetes says "unmasked"; powercap joins any list (S16)."""
    masked = list(context.masked_paths)
    if masked and _POWERCAP not in masked:
        masked.append(_POWERCAP)
    for path in (*masked, *context.readonly_paths):
        check_line(path, "path")
        if not path.startswith("/"):
            raise errors.InvalidArgument(f"masked or read-only path {path!r} is not absolute", kind="path", key=path)
    builder.with_masked_paths(masked).with_readonly_paths(list(context.readonly_paths))


def _capabilities(builder: SpecBuilder, context: pb.LinuxContainerSecurityContext) -> None:
    wanted = context.capabilities
    if wanted.add_capabilities or wanted.drop_capabilities or wanted.add_ambient_capabilities:
        ambient = [name for name in wanted.add_ambient_capabilities if name.upper() != "ALL"]
        builder.change_capabilities(
            add=[*wanted.add_capabilities, *wanted.add_ambient_capabilities], drop=list(wanted.drop_capabilities)
        )
        if len(ambient) != len(wanted.add_ambient_capabilities):
            ambient = builder.capabilities()
        if ambient:
            builder.with_ambient(capabilities.normalise(name) for name in ambient)


def _seccomp(builder: SpecBuilder, context: pb.LinuxContainerSecurityContext, default: bool) -> None:
    if context.privileged:
        builder.with_seccomp(None)
        return
    if context.HasField("seccomp"):
        kind, reference = context.seccomp.profile_type, context.seccomp.localhost_ref
    else:
        kind, reference = _old_profile(context.seccomp_profile_path, default)
    if kind == pb.SecurityProfile.Unconfined:
        builder.with_seccomp(None)
    elif kind == pb.SecurityProfile.RuntimeDefault:
        builder.with_seccomp_default()
    elif kind == pb.SecurityProfile.Localhost:
        path = reference.removeprefix(_LOCALHOST)
        if not path.startswith("/"):
            raise errors.InvalidArgument(f"seccomp profile {path!r} is not an absolute path", kind="seccomp", key=path)
        builder.with_seccomp(seccomp.load_profile(path))
    else:
        raise errors.InvalidArgument(f"unknown seccomp profile type {kind}", kind="seccomp")


def _old_profile(text: str, default: bool) -> tuple[pb.SecurityProfile.ProfileType.ValueType, str]:
    """The deprecated form of a profile: "runtime/default", "unconfined", "localhost/PATH", or nothing."""
    if not text:
        return (pb.SecurityProfile.RuntimeDefault if default else pb.SecurityProfile.Unconfined), ""
    if text in ("runtime/default", "docker/default"):
        return pb.SecurityProfile.RuntimeDefault, ""
    if text == "unconfined":
        return pb.SecurityProfile.Unconfined, ""
    if text.startswith(_LOCALHOST):
        return pb.SecurityProfile.Localhost, text
    raise errors.InvalidArgument(f"invalid seccomp profile {text!r}", kind="seccomp", key=text)


def _apparmor(builder: SpecBuilder, context: pb.LinuxContainerSecurityContext) -> None:
    if context.HasField("apparmor"):
        kind, reference = context.apparmor.profile_type, context.apparmor.localhost_ref
    elif context.apparmor_profile.startswith(_LOCALHOST):
        kind, reference = pb.SecurityProfile.Localhost, context.apparmor_profile
    elif context.apparmor_profile in ("", "runtime/default"):
        kind, reference = pb.SecurityProfile.RuntimeDefault, ""
    elif context.apparmor_profile == "unconfined":
        kind, reference = pb.SecurityProfile.Unconfined, ""
    else:
        raise errors.InvalidArgument(
            f"invalid apparmor profile {context.apparmor_profile!r}", kind="apparmor", key=context.apparmor_profile
        )
    if kind == pb.SecurityProfile.Unconfined or (kind == pb.SecurityProfile.RuntimeDefault and context.privileged):
        return
    if not apparmor.enabled():
        if kind == pb.SecurityProfile.Localhost:
            raise errors.FailedPrecondition(
                f"apparmor profile {reference!r} cannot be applied: apparmor is not supported by this kernel",
                kind="apparmor", key=reference,
            )
        return
    if kind == pb.SecurityProfile.RuntimeDefault:
        name = apparmor.default_profile()
    else:
        name = reference.removeprefix(_LOCALHOST)
        if name not in apparmor.loaded():
            raise errors.NotFound(f"apparmor profile not found {name}", kind="apparmor", key=name)
    builder.with_apparmor(name)
