"""Pulls and pushes as the commands ask for them: by the daemon where it can, by ourselves where not."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from pctr.command import Context, Failed
from pctr.image_config import host_platform, normalise
from pctr.progress import display
from pctr.transfer import Sink, Transfer
from supervisord_ctr import errors
from supervisord_ctr.api.types import types_pb2
from supervisord_ctr.api.types.transfer import transfer_pb2

if TYPE_CHECKING:
    from supervisord_ctr.images.auth import Credentials


class RegistryOptions(NamedTuple):
    """How to reach a registry."""

    user: str = ""
    plain_http: bool = False
    hosts_dir: str = ""
    skip_verify: bool = False
    local: bool = False

    @property
    def by_daemon(self) -> bool:
        """Whether the daemon may do it: it has no way to be told not to check a certificate."""
        return not (self.local or self.skip_verify)


def parse_platform(text: str) -> types_pb2.Platform:
    """`linux/arm/v7` as a message."""
    words = [*text.split("/"), "", ""]
    if len(words) < 4:
        words = ["linux", *words]
    return types_pb2.Platform(os=words[0], architecture=words[1], variant=words[2])


def with_password(login: str) -> str:
    """`NAME:PASSWORD` of a name: the password is asked for on a terminal, else it is a line of standard input."""
    if ":" in login or not login:
        return login
    if sys.stdin.isatty():
        import getpass

        secret = getpass.getpass(f"password of {login}: ")
    else:
        secret = sys.stdin.readline().rstrip("\r\n")
    if not secret:
        raise Failed(f"no password of {login} was given")
    return f"{login}:{secret}"


def credentials_for(name: str, user: str) -> Credentials | None:
    """Credentials for the registry of `name`: those given, for that host only, else Docker's configuration."""
    if user:
        from supervisord_ctr.images.auth import Credential, Static

        login, _, secret = user.partition(":")
        domain = name.partition("/")[0]
        hosts = {domain, "registry-1.docker.io"} if domain == "docker.io" else {domain}
        return Static(frozenset(hosts), Credential(login, secret))
    path = os.path.join(os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker"), "config.json")
    if not os.path.exists(path):
        return None
    from pathlib import Path

    from supervisord_ctr.images.auth import DockerConfig

    return DockerConfig(Path(path))


def resolver(name: str, options: RegistryOptions, transfer: Transfer) -> transfer_pb2.RegistryResolver:
    """What the daemon needs to know about the registry."""
    credentials = credentials_for(name, options.user)
    message = transfer_pb2.RegistryResolver(host_dir=os.path.abspath(options.hosts_dir) if options.hosts_dir else "")
    if options.plain_http:
        message.default_scheme = "http"
    if credentials is not None:
        message.auth_stream = transfer.credentials(credentials)
    return message


def pull_image(
    context: Context, name: str, *, platforms: Sequence[str] = (), all_platforms: bool = False, snapshotter: str = "",
    unpack: bool = True, labels: dict[str, str] | None = None, options: RegistryOptions | None = None,
    quiet: bool = False,
) -> str:
    """Pull an image and unpack it; returns its full name."""
    options = options or RegistryOptions()
    name = normalise(name)
    wanted = [] if all_platforms else list(platforms) or [host_platform()]
    with display(quiet) as sink:
        if options.by_daemon:
            try:
                _pull_by_daemon(context, name, wanted, snapshotter if unpack else "", labels or {}, options, sink)
                return name
            except errors.Unimplemented:
                pass
        from pctr.local_pull import pull

        pull(context, name, wanted, snapshotter if unpack else "", labels or {}, options, sink)
    return name


def _pull_by_daemon(
    context: Context, name: str, platforms: list[str], snapshotter: str, labels: dict[str, str],
    options: RegistryOptions, sink: Sink,
) -> None:
    transfer = Transfer(context.client)
    store = transfer_pb2.ImageStore(name=name, labels=labels, platforms=map(parse_platform, platforms))
    if snapshotter:
        for platform in platforms or [host_platform()]:
            store.unpacks.append(transfer_pb2.UnpackConfiguration(
                platform=parse_platform(platform), snapshotter=snapshotter))
    source = transfer_pb2.OCIRegistry(reference=name, resolver=resolver(name, options, transfer))
    transfer.run(source, store, sink)


def push_image(
    context: Context, local_name: str, remote_name: str, *, platforms: Sequence[str] = (),
    options: RegistryOptions | None = None, quiet: bool = False,
) -> None:
    """Push an image under a name."""
    options = options or RegistryOptions()
    with display(quiet) as sink:
        if options.by_daemon:
            try:
                transfer = Transfer(context.client)
                transfer.run(
                    transfer_pb2.ImageStore(name=local_name, platforms=map(parse_platform, platforms)),
                    transfer_pb2.OCIRegistry(reference=remote_name, resolver=resolver(remote_name, options, transfer)),
                    sink,
                )
                return
            except errors.Unimplemented:
                pass
        from pctr.local_pull import push

        push(context, local_name, remote_name, list(platforms), options, sink)
