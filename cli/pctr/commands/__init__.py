"""The commands, one file for each group; nothing is imported before its group is asked for."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pctr.command import Command


class Group:
    """Where a word of the command line leads: a module with `COMMAND`, or with `COMMANDS` under a group."""

    __slots__ = ("aliases", "module", "summary")

    def __init__(self, module: str, summary: str, aliases: tuple[str, ...] = ()) -> None:
        self.module = module
        self.summary = summary
        self.aliases = aliases


GROUPS: dict[str, Group] = {
    "run": Group("run", "create a container from an image and run it"),
    "image": Group("image", "pull, push and manage images", ("images", "i")),
    "container": Group("container", "manage containers", ("containers", "c")),
    "task": Group("task", "manage running containers", ("tasks", "t")),
    "content": Group("content", "look at and change stored blobs", ("c8t",)),
    "snapshot": Group("snapshot", "look at and change snapshots", ("snapshots", "s")),
    "namespace": Group("namespace", "manage namespaces", ("namespaces", "ns")),
    "lease": Group("lease", "manage leases", ("leases",)),
    "sandbox": Group("sandbox", "manage sandboxes", ("sandboxes", "sb")),
    "pod": Group("pod", "look at and manage a kubelet's pods", ("pods",)),
    "shim": Group("shim", "look at the shims behind running containers", ("shims",)),
    "plugin": Group("plugin", "list what the daemon is made of", ("plugins",)),
    "events": Group("events", "print events as they happen", ("event",)),
    "explain": Group("explain", "tell why a pod or container is as it is"),
    "gc": Group("gc", "collect what nothing refers to"),
    "doctor": Group("doctor", "find and repair what was left behind"),
    "oci": Group("oci", "print the OCI spec that a run would have"),
    "info": Group("info", "describe the daemon"),
    "version": Group("version", "print the versions of pctr and the daemon"),
    "completion": Group("completion", "print a completion script for a shell"),
}


def find(word: str) -> tuple[str, Group] | None:
    """The group that a word names, by name or alias."""
    if word in GROUPS:
        return word, GROUPS[word]
    return next(((name, group) for name, group in GROUPS.items() if word in group.aliases), None)


def load(group: str) -> tuple[Command, ...] | Command:
    """The command, or the commands, behind a group's name."""
    module = __import__(f"pctr.commands.{GROUPS[group].module}", fromlist=["COMMANDS"])
    found: tuple[Command, ...] | Command = getattr(module, "COMMANDS", None) or module.COMMAND
    return found
