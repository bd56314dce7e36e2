"""Pulls and pushes as the commands ask for them: by the daemon where it can, by ourselves where not."""

from __future__ import annotations

import os
import sys

from pctr import light_transfer as messages
from pctr.command import Context, Failed
from pctr.image_config import host_platform, normalise
from pctr.progress import display
from pctr.transfer import Transfer
from supervisord_ctr import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pctr.transfer import Sink
    from supervisord_ctr.images.auth import Credentials


class RegistryOptions:
    """How to reach a registry."""

    __slots__ = ("hosts_dir", "local", "plain_http", "skip_verify", "user")

    def __init__(
        self, user: str = "", plain_http: bool = False, hosts_dir: str = "", skip_verify: bool = False,
        local: bool = False,
    ) -> None:
        self.user = user
        self.plain_http = plain_http
        self.hosts_dir = hosts_dir
        self.skip_verify = skip_verify
        self.local = local

    @property
    def by_daemon(self) -> bool:
        """Whether the daemon may do it: it has no way to be told not to check a certificate."""
        return not (self.local or self.skip_verify)


def parse_platform(text: str) -> messages.Platform:
    """`linux/arm/v7` as a message."""
    words = [*text.split("/"), "", ""]
    if len(words) < 4:
        words = ["linux", *words]
    return messages.Platform(os=words[0], architecture=words[1], variant=words[2])


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


def resolver(name: str, options: RegistryOptions, transfer: Transfer) -> messages.RegistryResolver:
    """What the daemon needs to know about the registry."""
    credentials = credentials_for(name, options.user)
    message = messages.RegistryResolver(host_dir=os.path.abspath(options.hosts_dir) if options.hosts_dir else "")
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
    store = messages.ImageStore(name=name, labels=labels, platforms=list(map(parse_platform, platforms)))
    if snapshotter:
        for platform in platforms or [host_platform()]:
            store.unpacks.append(messages.UnpackConfiguration(
                platform=parse_platform(platform), snapshotter=snapshotter))
    source = messages.OCIRegistry(reference=name, resolver=resolver(name, options, transfer))
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
                    messages.ImageStore(name=local_name, platforms=list(map(parse_platform, platforms))),
                    messages.OCIRegistry(reference=remote_name, resolver=resolver(remote_name, options, transfer)),
                    sink,
                )
                return
            except errors.Unimplemented:
                pass
        from pctr.local_pull import push

        push(context, local_name, remote_name, list(platforms), options, sink)
