"""`config.json` as a plain dictionary: the default one, and a builder that changes it step by step.

The default equals what containerd's clients start from, so a container made by `pctr`, by `ctr` or
through CRI looks the same from inside. Nothing here reads the system except where it says so.

Source: OCI runtime specification, config.md and config-linux.md.
"""

from __future__ import annotations

import posixpath

from supervisord_ctr.errors import InvalidArgument
from supervisord_ctr.oci import capabilities

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any, Self

    from supervisord_ctr.oci.devices import Device
    from supervisord_ctr.oci.users import User

    Spec = dict[str, Any]

#: What an `Any` that carries a spec is called.
TYPE_URL = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
#: The same for `process` alone, as exec requests carry it.
PROCESS_TYPE_URL = "types.containerd.io/opencontainers/runtime-spec/1/Process"
#: And for `linux.resources`, as updates carry it.
RESOURCES_TYPE_URL = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"

VERSION = "1.1.0"
DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

#: Hidden from containers: they tell of the host or change it (S16: powercap included).
MASKED_PATHS = (
    "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
    "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/sys/devices/virtual/powercap", "/proc/scsi",
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
NAMESPACES = ("pid", "ipc", "uts", "mount", "network")

#: Working directories that would be a descriptor of the runtime (S3, CVE-2024-21626).
_FORBIDDEN_CWD = ("/proc", "/dev/fd")


def mount(destination: str, kind: str, source: str, *options: str) -> dict[str, Any]:
    """An entry of `mounts`."""
    return {"destination": destination, "type": kind, "source": source, "options": list(options)}


def default_mounts() -> list[dict[str, Any]]:
    """proc, dev, pts, shm, mqueue, sys and run."""
    return [
        mount("/proc", "proc", "proc", "nosuid", "noexec", "nodev"),
        mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        mount("/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
        mount("/dev/shm", "tmpfs", "shm", "nosuid", "noexec", "nodev", "mode=1777", "size=65536k"),
        mount("/dev/mqueue", "mqueue", "mqueue", "nosuid", "noexec", "nodev"),
        mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro"),
        mount("/run", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
    ]


def default_spec(namespace: str, container: str) -> Spec:
    """The spec of a container before anything was asked for; cgroup path `/<namespace>/<container>`."""
    return {
        "ociVersion": VERSION,
        "process": {
            "user": {"uid": 0, "gid": 0},
            "cwd": "/",
            "capabilities": capabilities.sets(capabilities.DEFAULT),
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs"},
        "mounts": default_mounts(),
        "linux": {
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "cgroupsPath": f"/{namespace}/{container}",
            "namespaces": [{"type": kind} for kind in NAMESPACES],
            "maskedPaths": list(MASKED_PATHS),
            "readonlyPaths": list(READONLY_PATHS),
        },
    }


def check_cwd(path: str) -> str:
    """`path` when a process may start there; relative ones and those below /proc or /dev/fd may not (S3)."""
    if not path.startswith("/"):
        raise InvalidArgument(f"working directory {path!r} is not absolute", kind="cwd", key=path)
    clean = posixpath.normpath("/" + path.lstrip("/"))
    for forbidden in _FORBIDDEN_CWD:
        if clean == forbidden or clean.startswith(f"{forbidden}/"):
            raise InvalidArgument(f"working directory {path!r} is below {forbidden}", kind="cwd", key=path)
    if "\x00" in path:
        raise InvalidArgument(f"working directory {path!r} holds a null byte", kind="cwd", key=path)
    return path


def merge_env(defaults: Iterable[str], overrides: Iterable[str]) -> list[str]:
    """Environment with `overrides` put in place of their namesakes; a name without "=" removes it."""
    result: dict[str, str] = {}
    for entry in defaults:
        result[entry.partition("=")[0]] = entry
    for entry in overrides:
        name, equals, _ = entry.partition("=")
        if not equals:
            result.pop(name, None)
        else:
            result[name] = entry
    return list(result.values())


def default_device_rules() -> list[dict[str, Any]]:
    """Cgroup rules for the nodes every container has: null, random, full, tty, zero, urandom, console, pts, ptmx."""
    pairs = ((1, 3), (1, 8), (1, 7), (5, 0), (1, 5), (1, 9), (5, 1), (136, None), (5, 2))
    rules: list[dict[str, Any]] = []
    for major, minor in pairs:
        rule: dict[str, Any] = {"allow": True, "type": "c", "major": major, "access": "rwm"}
        if minor is not None:
            rule["minor"] = minor
        rules.append(rule)
    return rules


def parse_mount(text: str) -> dict[str, Any]:
    """`type=bind,src=/a,dst=/b,options=rbind:ro` (also `ro`, `readonly`, `target=` …) to an entry of `mounts`."""
    entry: dict[str, Any] = {"destination": "", "type": "bind", "source": "", "options": []}
    keys = {"type": "type", "source": "source", "src": "source", "destination": "destination", "dst": "destination",
            "target": "destination"}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if key in keys and equals:
            entry[keys[key]] = value
        elif key == "options" and equals:
            entry["options"].extend(filter(None, value.split(":")))
        elif key in ("ro", "readonly") and value in ("", "true", "1"):
            entry["options"].append("ro")
        elif key in ("ro", "readonly") and value in ("false", "0"):
            continue
        else:
            raise InvalidArgument(f"invalid mount {text!r}: unknown word {part!r}", kind="mount", key=text)
    if not entry["destination"].startswith("/"):
        raise InvalidArgument(f"invalid mount {text!r}: dst must be an absolute path", kind="mount", key=text)
    if entry["type"] == "bind":
        if not entry["source"].startswith("/"):
            raise InvalidArgument(f"invalid mount {text!r}: src must be an absolute path", kind="mount", key=text)
        if not {"bind", "rbind"} & set(entry["options"]):
            entry["options"].insert(0, "rbind")
    return entry


class SpecBuilder:
    """Changes one spec; each method returns the builder, `spec` is the dictionary all the while.

    Errors are `InvalidArgument`. Order matters where it says so only: `with_seccomp_default` looks
    at the capabilities set so far.
    """

    def __init__(self, namespace: str, container: str, *, spec: Spec | None = None) -> None:
        self.spec: Spec = spec if spec is not None else default_spec(namespace, container)

    # -- parts -------------------------------------------------------------------------------------

    @property
    def process(self) -> dict[str, Any]:
        """The `process` object."""
        return self._part(self.spec, "process")

    @property
    def linux(self) -> dict[str, Any]:
        """The `linux` object."""
        return self._part(self.spec, "linux")

    @property
    def resources(self) -> dict[str, Any]:
        """The `linux.resources` object."""
        return self._part(self.linux, "resources")

    @staticmethod
    def _part(owner: dict[str, Any], name: str) -> dict[str, Any]:
        part: dict[str, Any] = owner.setdefault(name, {})
        return part

    # -- the process -------------------------------------------------------------------------------

    def with_image(
        self, *, env: Sequence[str] = (), entrypoint: Sequence[str] = (), cmd: Sequence[str] = (),
        working_dir: str = "", args: Sequence[str] = (),
    ) -> Self:
        """What an image's config says; `args` take the place of its `cmd`. Users go by `with_user`.

        Environment set before wins over the image's.
        """
        self.process["env"] = merge_env(env or (DEFAULT_PATH,), self.process.get("env") or ())
        self.process["args"] = [*entrypoint, *(args or cmd)]
        return self.with_cwd(working_dir or "/")

    def with_image_config(self, config: Mapping[str, Any], args: Sequence[str] = ()) -> Self:
        """`with_image` from the `config` object of an image's JSON (Env, Entrypoint, Cmd, WorkingDir)."""
        return self.with_image(
            env=config.get("Env") or (), entrypoint=config.get("Entrypoint") or (), cmd=config.get("Cmd") or (),
            working_dir=config.get("WorkingDir") or "", args=args,
        )

    def with_args(self, args: Sequence[str]) -> Self:
        """The command line, in place of what there was."""
        self.process["args"] = list(args)
        return self

    def with_env(self, entries: Iterable[str]) -> Self:
        """Environment entries "NAME=value", or "NAME" to remove one."""
        self.process["env"] = merge_env(self.process.get("env") or (), entries)
        return self

    def with_cwd(self, path: str) -> Self:
        """Where the process starts."""
        self.process["cwd"] = check_cwd(path)
        return self

    def with_user(self, user: User) -> Self:
        """Who the process runs as; see `users.resolve`."""
        self.process["user"] = user.to_spec()
        return self

    def with_terminal(self, width: int = 0, height: int = 0) -> Self:
        """A terminal, and TERM for programs that ask."""
        self.process["terminal"] = True
        if width and height:
            self.process["consoleSize"] = {"width": width, "height": height}
        return self.with_env(["TERM=xterm"])

    def with_capabilities(self, names: Iterable[str]) -> Self:
        """These capabilities and no others."""
        self.process["capabilities"] = capabilities.sets(names)
        return self

    def change_capabilities(self, *, add: Iterable[str] = (), drop: Iterable[str] = ()) -> Self:
        """Add to and drop from what is set; "ALL" is understood."""
        return self.with_capabilities(capabilities.change(self.capabilities(), add=add, drop=drop))

    def capabilities(self) -> list[str]:
        """The bounding set as it stands."""
        return list((self.process.get("capabilities") or {}).get("bounding") or ())

    def with_ambient(self, names: Iterable[str]) -> Self:
        """Ambient capabilities, for users other than root; they must be inheritable too."""
        listed = [capabilities.normalise(name) for name in names]
        self._part(self.process, "capabilities").update(inheritable=listed, ambient=list(listed))
        return self

    def with_new_privileges(self, allowed: bool = True) -> Self:
        """Whether set-uid programs may work."""
        self.process["noNewPrivileges"] = not allowed
        return self

    def with_rlimit(self, kind: str, soft: int, hard: int) -> Self:
        """One rlimit in place of its namesake."""
        from supervisord_ctr.oci.limits import rlimit

        entry = rlimit(kind, soft, hard)
        others = [known for known in self.process.get("rlimits") or () if known["type"] != entry["type"]]
        self.process["rlimits"] = [*others, entry]
        return self

    def with_oom_score(self, value: int) -> Self:
        """`oom_score_adj`, -1000 to 1000; clamped when the bundle is written, not here."""
        if not -1000 <= value <= 1000:
            raise InvalidArgument(f"oom score {value} is not in -1000 to 1000", kind="oom_score_adj", key=str(value))
        self.process["oomScoreAdj"] = value
        return self

    # -- root and mounts ---------------------------------------------------------------------------

    def with_root(self, path: str = "rootfs", *, readonly: bool = False) -> Self:
        """The root file system; a relative path is below the bundle."""
        self.spec["root"] = {"path": path, "readonly": True} if readonly else {"path": path}
        return self

    def with_mounts(self, entries: Iterable[Mapping[str, Any]]) -> Self:
        """Further mounts, made after those already there."""
        self.spec.setdefault("mounts", []).extend(dict(entry) for entry in entries)
        return self

    def without_mounts(self, *destinations: str) -> Self:
        """Take mounts away by their place."""
        gone = {posixpath.normpath(place) for place in destinations}
        self.spec["mounts"] = [
            entry for entry in self.spec.get("mounts") or () if posixpath.normpath(entry["destination"]) not in gone
        ]
        return self

    def with_shm_size(self, size: int) -> Self:
        """Size of /dev/shm in bytes."""
        for entry in self.spec.get("mounts") or ():
            if posixpath.normpath(entry["destination"]) == "/dev/shm" and entry.get("type") == "tmpfs":
                kept = [word for word in entry["options"] if not word.startswith("size=")]
                entry["options"] = [*kept, f"size={size // 1024}k"]
                return self
        raise InvalidArgument("there is no /dev/shm mount whose size could be set", kind="mount", key="/dev/shm")

    def with_host_files(self) -> Self:
        """The host's hosts and resolv.conf, read-only, for containers in the host's network."""
        return self.with_mounts(
            mount(path, "bind", path, "rbind", "ro") for path in ("/etc/hosts", "/etc/resolv.conf")
        )

    # -- namespaces --------------------------------------------------------------------------------

    def with_hostname(self, name: str) -> Self:
        """The host name inside (needs the UTS namespace)."""
        self.spec["hostname"] = name
        return self

    def with_namespace(self, kind: str, path: str = "") -> Self:
        """A namespace of its own, or the one at `path`."""
        entry = {"type": kind, "path": path} if path else {"type": kind}
        others = [known for known in self.linux.get("namespaces") or () if known["type"] != kind]
        self.linux["namespaces"] = [*others, entry]
        return self

    def with_host_namespace(self, kind: str) -> Self:
        """No namespace of that kind: the host's."""
        self.linux["namespaces"] = [
            known for known in self.linux.get("namespaces") or () if known["type"] != kind
        ]
        return self

    def with_user_namespace(
        self, uid_mappings: Sequence[tuple[int, int, int]], gid_mappings: Sequence[tuple[int, int, int]],
        path: str = "",
    ) -> Self:
        """A user namespace; mappings are (inside, outside, length)."""
        self.with_namespace("user", path)
        for name, mappings in (("uidMappings", uid_mappings), ("gidMappings", gid_mappings)):
            self.linux[name] = [
                {"containerID": inside, "hostID": outside, "size": length} for inside, outside, length in mappings
            ]
        return self

    # -- confinement -------------------------------------------------------------------------------

    def with_seccomp(self, profile: Mapping[str, Any] | None) -> Self:
        """A seccomp profile, or None for no filter."""
        if profile is None:
            self.linux.pop("seccomp", None)
        else:
            self.linux["seccomp"] = dict(profile)
        return self

    def with_seccomp_default(self) -> Self:
        """The default profile for the capabilities set so far."""
        from supervisord_ctr.oci import seccomp

        return self.with_seccomp(seccomp.default_profile(self.capabilities()))

    def with_apparmor(self, profile: str) -> Self:
        """An AppArmor profile by name, "" for none."""
        return self._word(self.process, "apparmorProfile", profile)

    def with_selinux(self, label: str, mount_label: str = "") -> Self:
        """SELinux labels, "" for none."""
        return self._word(self.process, "selinuxLabel", label)._word(self.linux, "mountLabel", mount_label)

    def _word(self, owner: dict[str, Any], key: str, value: str) -> Self:
        if value:
            owner[key] = value
        else:
            owner.pop(key, None)
        return self

    def with_masked_paths(self, paths: Iterable[str]) -> Self:
        """Paths hidden inside."""
        self.linux["maskedPaths"] = list(paths)
        return self

    def with_readonly_paths(self, paths: Iterable[str]) -> Self:
        """Paths read-only inside."""
        self.linux["readonlyPaths"] = list(paths)
        return self

    def with_privileged(self, *, host_devices: bool = True) -> Self:
        """Everything this process may do: all its capabilities, no filters, writable /sys, the host's devices."""
        self.with_capabilities(capabilities.current())
        self.with_masked_paths(()).with_readonly_paths(()).with_seccomp(None).with_apparmor("").with_selinux("")
        for entry in self.spec.get("mounts") or ():
            if entry.get("type") in ("sysfs", "cgroup"):
                entry["options"] = ["rw" if word == "ro" else word for word in entry["options"]]
        if host_devices:
            from supervisord_ctr.oci import devices

            self.linux["devices"] = [device.to_spec() for device in devices.host_devices()]
            self.resources["devices"] = [{"allow": True, "access": "rwm"}]
        return self

    # -- devices and resources -----------------------------------------------------------------------

    def with_default_devices(self) -> Self:
        """Cgroup rules for null, zero, tty and the others that every container has."""
        self.resources.setdefault("devices", []).extend(default_device_rules())
        return self

    def with_devices(self, listed: Iterable[Device], access: str = "rwm") -> Self:
        """Device nodes and the rules that allow them."""
        for device in listed:
            known = [entry for entry in self.linux.get("devices") or () if entry["path"] != device.path]
            self.linux["devices"] = [*known, device.to_spec()]
            self.resources.setdefault("devices", []).append(device.rule(access))
        return self

    def with_cgroup(self, path: str) -> Self:
        """The cgroup's path, or "slice:prefix:name" for the systemd driver."""
        self.linux["cgroupsPath"] = path
        return self

    def with_memory(self, limit: int = 0, *, swap: int = 0, reservation: int = 0) -> Self:
        """Bytes; 0 leaves a value alone. `swap` is memory and swap together."""
        values = {"limit": limit, "swap": swap, "reservation": reservation}
        self._part(self.resources, "memory").update({key: value for key, value in values.items() if value})
        return self

    def with_cpu(
        self, *, shares: int = 0, quota: int = 0, period: int = 0, cpus: str = "", mems: str = "",
    ) -> Self:
        """Relative weight, microseconds of quota in a period, and cpuset lists; 0 and "" leave a value alone."""
        values = {"shares": shares, "quota": quota, "period": period, "cpus": cpus, "mems": mems}
        self._part(self.resources, "cpu").update({key: value for key, value in values.items() if value})
        return self

    def with_pids_limit(self, limit: int) -> Self:
        """Most processes; -1 for no limit."""
        self.resources["pids"] = {"limit": limit}
        return self

    def with_hugepages(self, limits: Iterable[tuple[str, int]]) -> Self:
        """Bytes for each page size ("2MB", "1GB")."""
        self.resources["hugepageLimits"] = [{"pageSize": size, "limit": limit} for size, limit in limits]
        return self

    def with_unified(self, entries: Mapping[str, str]) -> Self:
        """cgroup v2 files and what is written to them."""
        self._part(self.resources, "unified").update(entries)
        return self

    def with_sysctls(self, entries: Mapping[str, str]) -> Self:
        """Kernel parameters; names and values must hold no control characters (S10)."""
        from supervisord_ctr.names import check_line

        for name, value in entries.items():
            self._part(self.linux, "sysctl")[check_line(name, "sysctl")] = check_line(value, f"sysctl {name}")
        return self

    def with_annotations(self, entries: Mapping[str, str]) -> Self:
        """Annotations of the spec."""
        self._part(self.spec, "annotations").update(entries)
        return self

    # -- result ------------------------------------------------------------------------------------

    def to_json(self, dumps: Callable[[object], str] | None = None) -> bytes:
        """The document, compact, written by `dumps`. Refuses a process without a command line."""
        if "process" in self.spec and not self.process.get("args"):
            raise InvalidArgument("no command is given: neither the image nor the request states one", kind="args")
        if dumps is not None:
            return dumps(self.spec).encode()
        import json

        return json.dumps(self.spec, separators=(",", ":")).encode()
