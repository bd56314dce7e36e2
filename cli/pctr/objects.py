"""Single blobs: to and from registries, edited, and no longer referred to."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

from pctr import services
from pctr.command import Context, Failed, UsageError, new_id, parse_labels
from pctr.commands.image import registry_options
from pctr.image_config import normalise
from pctr.progress import display
from supervisord_ctr import errors
from supervisord_ctr.model import Descriptor
from supervisord_ctr.names import check_digest


def fetch_object(context: Context) -> None:
    """One blob of a repository to standard output."""
    from pctr.local_pull import with_registry
    from supervisord_ctr.images.http import HostFailure
    from supervisord_ctr.images.registry import BlobRefused, Registry

    args = context.args
    digest = check_digest(args.digest)

    async def work(registry: Registry) -> None:
        import hashlib

        failures = registry.failures(f"blob {digest} of {registry.reference.name}")
        for host in registry.hosts("pull"):
            try:
                async with registry.open_blob(host, Descriptor("", digest, 0), 0) as (_, response):
                    seen = hashlib.new(digest.partition(":")[0])
                    async for data in response.content.iter_chunked(1 << 20):
                        seen.update(data)
                        sys.stdout.buffer.write(data)
                    sys.stdout.buffer.flush()
                    if f"{seen.name}:{seen.hexdigest()}" != digest:
                        raise Failed(f"{host.url}: its bytes are not those of {digest}")
                    return
            except BlobRefused as refused:
                failures.add(host, refused.status, refused.reason)
            except HostFailure as failure:
                registry.note_failure(host, failures, failure)
        raise failures.error()

    with_registry(normalise(args.reference), registry_options(args), work)


def push_object(context: Context) -> None:
    """One blob of the daemon to a repository."""
    from pctr.local_pull import push_blob, with_registry
    from supervisord_ctr.images.registry import Registry

    args, client = context.args, context.client
    info = services.content_info(client, args.digest)
    with display(args.quiet) as sink:

        async def work(registry: Registry) -> None:
            await push_blob(client, registry, Descriptor("", info.digest, info.size), sink)

        with_registry(normalise(args.reference), registry_options(args), work)
    print(info.digest)


def edit_object(context: Context) -> None:
    """Open a copy of a blob in an editor and store the result; its digest is printed."""
    import tempfile

    args, client = context.args, context.client
    editor = args.editor or os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    with tempfile.NamedTemporaryFile(prefix="pctr-edit-") as file:
        for part in services.read_content(client, args.digest):
            file.write(part)
        file.flush()
        for command in filter(None, (editor, args.validate)):
            try:
                status = subprocess.run([*shlex.split(command), file.name], check=False).returncode
            except FileNotFoundError:
                raise Failed(f"{command}: no such program; nothing was stored") from None
            if status:
                raise Failed(f"{command}: failed; nothing was stored")
        with open(file.name, "rb") as edited:
            pieces = iter(lambda: edited.read(1 << 20), b"")
            print(services.write_content(client, f"pctr-edit-{new_id()}", pieces, labels=parse_labels(args.label)))


def prune_references(context: Context) -> None:
    """Remove `gc.ref.content.l.*` labels: unpacked layers then go with the next garbage collection."""
    args, client = context.args, context.client
    if not args.references:
        raise UsageError("say what to prune: --references")
    for info in services.list_content(client):
        names = [key for key in info.labels if key.startswith("containerd.io/gc.ref.content.l.")]
        if not names:
            continue
        if not args.dry_run:
            try:
                services.update_content_labels(client, info.digest, dict.fromkeys(names, ""))
            except errors.NotFound:
                continue
        print(info.digest)
