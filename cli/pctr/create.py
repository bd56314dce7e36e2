"""From the options of a run to a container: image, spec, snapshot, record.

Shared by `run`, `container create` and `oci spec`. The spec itself is built by
`supervisord_ctr.oci`; what is decided here is only which option means what.
"""

from __future__ import annotations

import os
import sys

from pctr import documents, light
from pctr.command import (
    DEFAULT_RUNTIME,
    Context,
    UsageError,
    label_option,
    new_id,
    parse_labels,
    parse_size,
    snapshotter_option,
)
from pctr.contexts import ExitStack, suppress
from pctr.image_config import ImageConfig, get_image, load_config, read_json, unpacked_chain_id
from pctr.rpc import CONTAINERS, SNAPSHOTS, Client
from supervisord_ctr import errors
from supervisord_ctr.oci.spec import TYPE_URL, SpecBuilder, parse_mount

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from pctr.command import Arguments
    from supervisord_ctr.linux.idmaps import IdMap
    from supervisord_ctr.oci.users import User

STOP_SIGNAL_LABEL = "io.containerd.image.config.stop-signal"
RUNC_OPTIONS_URL = "containerd.runc.v1.Options"
#: Label prefixes that an image may not set on a container (S4).
_RESERVED_LABELS = ("containerd.io/", "io.containerd.", "io.cri-containerd", "io.kubernetes.", "pctr/")


class Created:
    """A container that exists now, and the mounts of its root file system ([] when the spec says where it is)."""

    __slots__ = ("id", "image", "mounts", "snapshot_key", "snapshotter")

    def __init__(
        self, name: str, mounts: list[light.Mount], image: str, snapshotter: str, snapshot_key: str,
    ) -> None:
        self.id = name
        self.mounts = mounts
        self.image = image
        self.snapshotter = snapshotter
        self.snapshot_key = snapshot_key


def create_options(parser: Arguments) -> None:
    """Everything that says what the container is like."""
    add = parser.add_argument
    process = parser.add_argument_group("process")
    process.add_argument("-e", "--env", action="append", default=[], metavar="NAME=VALUE", help="environment entry")
    process.add_argument("--env-file", action="append", default=[], metavar="FILE", help="file of environment entries")
    process.add_argument("-w", "--workdir", "--cwd", metavar="DIR", help="working directory")
    process.add_argument("-u", "--user", metavar="USER[:GROUP]", help="user and group, by name or number")
    process.add_argument("--entrypoint", metavar="WORDS", help="program in place of the image's; \"\" for none")
    process.add_argument("-t", "--tty", action="store_true", help="give the process a terminal")
    process.add_argument("-i", "--interactive", action="store_true", help="pass our standard input on")
    process.add_argument("--rlimit", "--ulimit", action="append", default=[], metavar="NAME=SOFT[:HARD]",
                         help="resource limit, such as nofile=1024:4096")
    process.add_argument("--oom-score-adj", type=int, metavar="N", help="-1000 to 1000")
    files = parser.add_argument_group("files")
    files.add_argument("--mount", action="append", default=[], metavar="SPEC",
                       help="type=bind,src=/a,dst=/b,options=rbind:ro; type=tmpfs,dst=/t")
    files.add_argument("-v", "--volume", action="append", default=[], metavar="SRC:DST[:ro]",
                       help="bind mount, in short")
    files.add_argument("--volumes", action="store_true", help="give each VOLUME of the image an anonymous mount")
    files.add_argument("--read-only", action="store_true", help="read-only root file system")
    files.add_argument("--rootfs", action="store_true", help="IMAGE is a folder that holds the root file system")
    files.add_argument("--device", action="append", default=[], metavar="HOST[:INSIDE[:rwm]]",
                       help="device node or folder")
    files.add_argument("--shm-size", metavar="SIZE", help="size of /dev/shm")
    _isolation_options(parser)
    _resource_options(parser)
    add("--annotation", action="append", default=[], metavar="KEY=VALUE", help="annotation of the spec")
    label_option(parser, "label of the container")
    add("--platform", metavar="OS/ARCH", help="platform to choose from the image")
    add("--runtime", metavar="NAME", default=DEFAULT_RUNTIME, help=f"runtime (default: {DEFAULT_RUNTIME})")
    add("--runc-binary", metavar="PATH", help="OCI runtime behind the shim, such as crun")
    add("--runc-root", metavar="DIR", help="state folder of the OCI runtime")
    add("--runc-systemd-cgroup", action="store_true",
        help="make cgroups through systemd; needs --cgroup SLICE:PREFIX:NAME")
    add("--config", metavar="FILE", help="spec to use instead of building one; the image gives the root only")
    snapshotter_option(parser)


def _isolation_options(parser: Arguments) -> None:
    group = parser.add_argument_group("isolation")
    group.add_argument("--privileged", action="store_true", help="all capabilities and devices, no filters")
    group.add_argument("--cap-add", action="append", default=[], metavar="CAP", help="add a capability, or ALL")
    group.add_argument("--cap-drop", action="append", default=[], metavar="CAP", help="drop a capability, or ALL")
    group.add_argument("--allow-new-privs", action="store_true", help="let set-uid programs work")
    group.add_argument("--seccomp-profile", "--security-profile", metavar="FILE",
                       help="seccomp profile in place of the default; \"unconfined\" for none")
    group.add_argument("--apparmor-profile", metavar="NAME", help="AppArmor profile")
    group.add_argument("--net", choices=("none", "host", "bridge"), default="none",
                       help="none: loopback only (default); host: the host's; bridge: an address on a bridge")
    group.add_argument("--net-host", action="store_const", dest="net", const="host", help="the same as --net host")
    group.add_argument("--hostname", metavar="NAME", help="host name inside")
    group.add_argument("--pid", choices=("private", "host"), default="private", help="PID namespace")
    group.add_argument("--ipc", choices=("private", "host"), default="private", help="IPC namespace")
    group.add_argument("--with-ns", action="append", default=[], metavar="TYPE:PATH",
                       help="join the namespace at a path")
    group.add_argument("--uidmap", action="append", default=[], metavar="IN:OUT:LENGTH", help="user namespace mapping")
    group.add_argument("--gidmap", action="append", default=[], metavar="IN:OUT:LENGTH", help="group mapping")
    group.add_argument("--remap-labels", action="store_true",
                       help="have the snapshotter map the owners of files, whether it says that it can or not")
    group.add_argument("--sysctl", action="append", default=[], metavar="NAME=VALUE", help="kernel parameter")
    group.add_argument("--cgroup", metavar="PATH", help="cgroup path; \"\" for none")


def _resource_options(parser: Arguments) -> None:
    group = parser.add_argument_group("resources")
    group.add_argument("-m", "--memory", "--memory-limit", metavar="SIZE", help="memory limit, such as 512m")
    group.add_argument("--memory-swap", metavar="SIZE", help="memory and swap together")
    group.add_argument("--memory-reservation", metavar="SIZE", help="soft memory limit")
    group.add_argument("--cpus", type=float, metavar="N", help="CPUs' worth of time, such as 1.5")
    group.add_argument("--cpu-shares", type=int, metavar="N", help="relative weight")
    group.add_argument("--cpu-quota", type=int, metavar="US", help="microseconds in each period")
    group.add_argument("--cpu-period", type=int, metavar="US", help="period in microseconds")
    group.add_argument("--cpuset-cpus", metavar="LIST", help="CPUs to use, such as 0-3")
    group.add_argument("--cpuset-mems", metavar="LIST", help="memory nodes to use")
    group.add_argument("--pids-limit", type=int, metavar="N", help="most processes; -1 for no limit")


# -- the spec ------------------------------------------------------------------------------------------


def _environment(args: Any) -> list[str]:
    entries: list[str] = []
    for path in args.env_file:
        with open(path, "rb") as file:
            data = file.read()
        try:
            lines = data.decode().split("\n")
        except UnicodeDecodeError:
            raise UsageError(f"{path}: is not UTF-8 text") from None
        entries += [line for line in (line.rstrip("\r") for line in lines) if _says_something(line)]
    entries += args.env
    # A bare NAME takes our own value, as in docker and podman; unset here means unset inside.
    result = []
    for entry in entries:
        if "=" not in entry and entry in os.environ:
            entry = f"{entry}={os.environ[entry]}"
        result.append(entry)
    return result


def _says_something(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _pairs(entries: list[str], what: str) -> dict[str, str]:
    for entry in entries:
        if "=" not in entry:
            raise UsageError(f"{what} {entry!r} is not NAME=VALUE")
    return parse_labels(entries)


def _volume(text: str) -> dict[str, Any]:
    parts = text.split(":")
    if len(parts) not in (2, 3) or not parts[0].startswith("/") or not parts[1].startswith("/"):
        raise UsageError(f"volume {text!r} is not /SRC:/DST[:OPTIONS]")
    words = parts[2].split(",") if len(parts) == 3 else []
    return {"destination": parts[1], "type": "bind", "source": parts[0], "options": ["rbind", *filter(None, words)]}


def id_maps(args: Any) -> tuple[list[IdMap], list[IdMap]]:
    """The ranges of `--uidmap` and of `--gidmap`: both, or neither."""
    if args.config and (args.uidmap or args.gidmap):
        raise UsageError(f"--uidmap and --gidmap cannot be given with --config: {args.config} states its own mappings")
    if bool(args.uidmap) != bool(args.gidmap):
        raise UsageError("--uidmap and --gidmap go together")
    if args.remap_labels and not args.uidmap:
        raise UsageError("--remap-labels needs --uidmap and --gidmap")
    return [_mapping(entry) for entry in args.uidmap], [_mapping(entry) for entry in args.gidmap]


def _mapping(text: str) -> IdMap:
    parts = text.split(":")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise UsageError(f"mapping {text!r} is not INSIDE:OUTSIDE:LENGTH")
    from supervisord_ctr.linux.idmaps import IdMap

    return IdMap(*map(int, parts))


def build_spec(
    args: Any, namespace: str, container: str, image: ImageConfig | None, command: list[str],
    rootfs: str = "",
) -> SpecBuilder:
    """The spec for these options, but for the user (see `resolve_user`)."""
    if args.config:
        with open(args.config, "rb") as file:
            data = file.read()
        try:
            return SpecBuilder(namespace, container, spec=documents.loads(data))
        except ValueError as error:
            raise UsageError(f"{args.config}: is no spec: {error}") from None
    builder = SpecBuilder(namespace, container)
    _process(builder, args, image, command)
    builder.with_root(rootfs or "rootfs", readonly=args.read_only)
    _isolation(builder, args)
    set_resources(builder, args)
    builder.with_mounts([parse_mount(entry) for entry in args.mount] + [_volume(entry) for entry in args.volume])
    if args.shm_size:
        builder.with_shm_size(parse_size(args.shm_size))
    if args.annotation:
        builder.with_annotations(_pairs(args.annotation, "annotation"))
    return builder


def _process(builder: SpecBuilder, args: Any, image: ImageConfig | None, command: list[str]) -> None:
    config = dict(image.runtime) if image is not None else {}
    if args.entrypoint is not None:
        config["Entrypoint"] = args.entrypoint.split()
        config["Cmd"] = []
    builder.with_image_config(config, command)
    if args.tty:
        from pctr import terminal

        width, height = terminal.size(1) if terminal.size(1) != (0, 0) else terminal.size(0)
        builder.with_terminal(width, height)
    entries = _environment(args)
    if entries:
        builder.with_env(entries)
    if args.workdir:
        builder.with_cwd(args.workdir)
    for entry in args.rlimit:
        name, _, values = entry.partition("=")
        soft, _, hard = values.partition(":")
        try:
            builder.with_rlimit(name, int(soft), int(hard or soft))
        except ValueError:
            raise UsageError(f"rlimit {entry!r} is not NAME=SOFT[:HARD]") from None
    if args.oom_score_adj is not None:
        builder.with_oom_score(args.oom_score_adj)


def _isolation(builder: SpecBuilder, args: Any) -> None:
    if args.cap_add or args.cap_drop:
        builder.change_capabilities(add=args.cap_add, drop=args.cap_drop)
    if args.privileged:
        builder.with_privileged().with_new_privileges()
    else:
        builder.with_default_devices()
        if args.seccomp_profile is None:
            builder.with_seccomp_default()
        elif args.seccomp_profile != "unconfined":
            from supervisord_ctr.oci.seccomp import load_profile

            builder.with_seccomp(load_profile(args.seccomp_profile))
    if args.allow_new_privs:
        builder.with_new_privileges()
    if args.apparmor_profile:
        builder.with_apparmor(args.apparmor_profile)
    for entry in args.device:
        from supervisord_ctr.oci import devices

        listed, access = devices.parse(entry)
        builder.with_devices(listed, access)
    if args.net == "host":
        builder.with_host_namespace("network")
    if args.net in ("host", "bridge"):
        builder.with_host_files()
    for kind in ("pid", "ipc"):
        if getattr(args, kind) == "host":
            builder.with_host_namespace(kind)
    for entry in args.with_ns:
        kind, _, path = entry.partition(":")
        if not path.startswith("/"):
            raise UsageError(f"namespace {entry!r} is not TYPE:/PATH")
        builder.with_namespace(kind, path)
    uids, gids = id_maps(args)
    if uids:
        builder.with_user_namespace(uids, gids)
    if args.hostname:
        builder.with_hostname(args.hostname)
    if args.sysctl:
        builder.with_sysctls(_pairs(args.sysctl, "sysctl"))
    if args.cgroup is not None:
        builder.with_cgroup(args.cgroup)


def set_resources(builder: SpecBuilder, args: Any) -> None:
    """The limits of `--memory`, `--cpus` and their like."""
    sizes = {name: parse_size(value) for name in ("memory", "memory_swap", "memory_reservation")
             if (value := getattr(args, name))}
    if sizes:
        builder.with_memory(sizes.get("memory", 0), swap=sizes.get("memory_swap", 0),
                            reservation=sizes.get("memory_reservation", 0))
    quota, period = args.cpu_quota or 0, args.cpu_period or 0
    if args.cpus is not None:
        if args.cpus <= 0 or quota:
            raise UsageError("--cpus must be above 0 and stands in place of --cpu-quota")
        period = period or 100_000
        quota = int(args.cpus * period)
    if quota or period or args.cpu_shares or args.cpuset_cpus or args.cpuset_mems:
        builder.with_cpu(shares=args.cpu_shares or 0, quota=quota, period=period, cpus=args.cpuset_cpus or "",
                         mems=args.cpuset_mems or "")
    if args.pids_limit is not None:
        builder.with_pids_limit(args.pids_limit)


def anonymous_mounts(volumes: Iterable[str]) -> list[dict[str, Any]]:
    """A tmpfs for each VOLUME, filled with what the image has there; it goes with the container."""
    from supervisord_ctr.names import check_line

    options = ["tmpcopyup", "nosuid", "nodev", "mode=755"]
    return [
        {"destination": check_line(path, "volume"), "type": "tmpfs", "source": "volume", "options": list(options)}
        for path in sorted(volumes) if path.startswith("/")
    ]


# -- users ---------------------------------------------------------------------------------------------


def _root_has_groups(mounts: list[light.Mount]) -> bool:
    """Whether the image's /etc/group may list root as a member.

    Looks into the layers directly, without following a single link; anything unusual counts as
    yes, and the slow and exact way decides.
    """
    if len(mounts) != 1:
        return True
    if mounts[0].type == "overlay":
        words = [option.partition("=") for option in mounts[0].options]
        folders = [value for key, _, values in words if key == "lowerdir" for value in values.split(":")]
    elif mounts[0].type in ("bind", "rbind"):
        folders = [mounts[0].source]
    else:
        return True
    for folder in folders:
        try:
            etc = os.open(os.path.join(folder, "etc"), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        except OSError:
            return True
        try:
            group = os.open("group", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=etc)
        except FileNotFoundError:
            continue
        except OSError:
            return True
        finally:
            os.close(etc)
        with open(group, "rb") as file:
            text = file.read(1 << 20)
            return len(text) == 1 << 20 or any(b"root" in line.rpartition(b":")[2] for line in text.split(b"\n"))
    return False


def resolve_user(mounts: list[light.Mount], rootfs: str, user: str) -> User | None:
    """Who `user` is inside; None for root without further groups, which needs no look at the files."""
    if user in ("", "0", "root", "0:0", "root:root") and not rootfs and not _root_has_groups(mounts):
        return None
    from supervisord_ctr.linux.mounts import temp_mount
    from supervisord_ctr.model import Mount
    from supervisord_ctr.oci.users import resolve

    with ExitStack() as stack:
        if not rootfs:
            entries = [Mount(entry.type, entry.source, (*entry.options, "ro"), entry.target) for entry in mounts]
            rootfs = stack.enter_context(temp_mount(entries))
        descriptor = os.open(rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, descriptor)
        return resolve(descriptor, user)


# -- the container -------------------------------------------------------------------------------------


def runtime_options(args: Any) -> light.Any_ | None:
    """containerd.runc.v1.Options when any is set."""
    uids, gids = id_maps(args)
    if not (args.runc_binary or args.runc_root or args.runc_systemd_cgroup or uids):
        return None
    from supervisord_ctr.api.runc.v1 import options_pb2

    options = options_pb2.Options(
        binary_name=args.runc_binary or "", root=args.runc_root or "", systemd_cgroup=args.runc_systemd_cgroup,
        # The pipes belong to root of the user namespace; nobody in there could open /dev/stdout otherwise.
        io_uid=uids[0].outside if uids else 0, io_gid=gids[0].outside if gids else 0,
    )
    return light.Any_(type_url=RUNC_OPTIONS_URL, value=options.SerializeToString())


def _check_systemd_cgroup(args: Any) -> None:
    """runc's own words on a cgroup that systemd cannot make tell nobody which option it comes from."""
    if args.runc_systemd_cgroup and not args.config and (args.cgroup or "").count(":") != 2:
        raise UsageError("--runc-systemd-cgroup needs --cgroup SLICE:PREFIX:NAME, such as system.slice:pctr:web")


def _have_default_apparmor_profile(name: str) -> None:
    """The default profile has a known text: it is loaded for whoever names it, as pods have it loaded for them."""
    from supervisord_ctr.oci import apparmor

    if name == apparmor.DEFAULT_PROFILE and apparmor.enabled():
        apparmor.default_profile()


def container_labels(args: Any, image: ImageConfig | None) -> dict[str, str]:
    """The image's labels but reserved ones, its stop signal, and those of the command line."""
    labels: dict[str, str] = {}
    if image is not None:
        for key, value in (image.runtime.get("Labels") or {}).items():
            if not key.startswith(_RESERVED_LABELS) and len(key.encode()) + len(value.encode()) <= 4096:
                labels[key] = value
        if image.runtime.get("StopSignal"):
            labels[STOP_SIGNAL_LABEL] = image.runtime["StopSignal"]
    labels.update(parse_labels(args.label))
    return labels


def _snapshot(client: Client, snapshotter: str, key: str, image: ImageConfig, args: Any) -> list[light.Mount]:
    parent = unpacked_chain_id(client, image, snapshotter)
    request = light.PrepareSnapshotRequest(snapshotter=snapshotter, key=key, parent=parent)
    try:
        return _prepare(client, request, args)
    except errors.NotFound:
        from pctr.unpack import unpack

        unpack(client, image.manifest_digest, image.diff_ids, read_json(client, image.manifest_digest), snapshotter)
        return _prepare(client, request, args)


def _prepare(client: Client, request: light.PrepareSnapshotRequest, args: Any) -> list[light.Mount]:
    with ExitStack() as stack:
        uids, gids = id_maps(args)
        if uids:
            from pctr import mapped
            from pctr.services import Lease
            from supervisord_ctr.linux import idmaps

            if args.remap_labels or mapped.can_map(client, request.snapshotter):
                request.labels = idmaps.snapshot_labels(uids, gids)
            else:
                lease = stack.enter_context(Lease(client))
                request.parent = mapped.mapped_parent(client, lease, request.snapshotter, request.parent, uids, gids)
        call = client.start(SNAPSHOTS + "Prepare", request, light.PrepareSnapshotResponse)
        import pctr.running  # noqa: F401  (what `run` needs next is loaded while the daemon makes the snapshot)

        return call.result().mounts


def find_image(context: Context, name: str, pull: str, platform: str) -> light.Image:
    """The image to run: what is there, or pulled first as `--pull` says."""
    if pull != "always":
        try:
            return get_image(context.client, name)
        except errors.NotFound:
            if pull == "never":
                raise
    from pctr.pulling import pull_image

    print(f"pctr: pulling {name}", file=sys.stderr)
    pull_image(context, name, platforms=[platform] if platform else [], snapshotter=context.snapshotter)
    return get_image(context.client, name)


def create_container(context: Context, reference: str, container: str, command: list[str]) -> Created:
    """Make the container of these arguments; what was made of it is removed again when that fails.

    The record comes first and names its snapshot, so garbage collection never sees the snapshot
    without an owner.
    """
    args, client = context.args, context.client
    _check_systemd_cgroup(args)
    container = container or new_id()
    image, rootfs, snapshotter = None, "", ""
    if args.rootfs:
        rootfs = os.path.abspath(reference)
        name = ""
    else:
        found = find_image(context, reference, getattr(args, "pull", "never"), args.platform or "")
        image = load_config(client, found, args.platform or "")
        name, snapshotter = found.name, context.snapshotter
    builder = build_spec(args, context.namespace, container, image, command, rootfs)
    if args.apparmor_profile:
        _have_default_apparmor_profile(args.apparmor_profile)
    if args.volumes and image is not None:
        builder.with_mounts(anonymous_mounts(image.runtime.get("Volumes") or {}))
    user = args.user if args.user is not None else (image.runtime.get("User") or "" if image is not None else "")
    record = light.Container(
        id=container, labels=container_labels(args, image), image=name,
        runtime=light.Runtime(name=args.runtime, options=runtime_options(args)),
        spec=light.Any_(type_url=TYPE_URL, value=builder.to_json(documents.dumps)),
        snapshotter=snapshotter, snapshot_key=container if snapshotter else "",
    )
    client.unary(CONTAINERS + "Create", light.ContainerMessage(container=record), light.ContainerMessage)
    mounts: list[light.Mount] = []
    try:
        if image is not None:
            mounts = _snapshot(client, snapshotter, container, image, args)
        if not args.config and (found_user := resolve_user(mounts, rootfs, user)) is not None:
            builder.with_user(found_user)
            record.spec = light.Any_(type_url=TYPE_URL, value=builder.to_json(documents.dumps))
            client.unary(
                CONTAINERS + "Update",
                light.UpdateContainerRequest(container=record, update_mask=light.FieldMask(paths=["spec"])),
                light.ContainerMessage,
            )
    except BaseException:
        with suppress(errors.Error):
            remove_container(client, Created(container, mounts, name, snapshotter, container if snapshotter else ""))
        raise
    return Created(container, mounts, name, snapshotter, container if snapshotter else "")


def remove_container(client: Client, container: Created, *, keep_snapshot: bool = False) -> None:
    """Delete the record and its snapshot, both at once; what is gone already is fine."""
    calls = [client.start(CONTAINERS + "Delete", light.ContainerId(id=container.id), light.Empty)]
    if container.snapshot_key and not keep_snapshot:
        calls.append(client.start(
            SNAPSHOTS + "Remove",
            light.RemoveSnapshotRequest(snapshotter=container.snapshotter, key=container.snapshot_key), light.Empty,
        ))
    for call in calls:
        with suppress(errors.NotFound):
            call.result()
