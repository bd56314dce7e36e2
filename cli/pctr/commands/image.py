"""`pctr image`: names for content, and moving them in and out."""

from __future__ import annotations

from pctr import output
from pctr.command import (
    Command,
    Context,
    Failed,
    UsageError,
    document_option,
    filters_argument,
    format_option,
    label_option,
    parse_labels,
    snapshotter_option,
)
from supervisord_ctr import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pctr.command import Arguments
    from pctr.image_tree import Node
    from pctr.pulling import RegistryOptions
    from pctr.rpc import Client


_PINNED = "io.cri-containerd.pinned"


# -- pull and push -------------------------------------------------------------------------------------


def registry_arguments(parser: Arguments) -> None:
    """Options of everything that talks to a registry."""
    group = parser.add_argument_group("registry")
    group.add_argument("--user", metavar="NAME[:PASSWORD]", default="",
                       help="credentials; a password that is missing is asked for, or read from standard input")
    group.add_argument("--plain-http", action="store_true", help="no TLS")
    group.add_argument("-k", "--skip-verify", action="store_true", help="do not check the registry's certificate")
    group.add_argument("--hosts-dir", metavar="DIR", default="", help="registry hosts (DIR/HOST/hosts.toml)")
    group.add_argument("--local", action="store_true", help="let pctr, not the daemon, talk to the registry")
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")


def registry_options(args: Any) -> RegistryOptions:
    """The options of `registry_arguments`."""
    from pctr.pulling import RegistryOptions, with_password

    return RegistryOptions(with_password(args.user), args.plain_http, args.hosts_dir, args.skip_verify, args.local)


def _pull_arguments(parser: Arguments) -> None:
    parser.add_argument("--platform", action="append", default=[], metavar="OS/ARCH", help="platform; may be repeated")
    parser.add_argument("--all-platforms", action="store_true", help="every platform of the image")
    parser.add_argument("--no-unpack", action="store_true", help="only fetch the content")
    label_option(parser, "label of the image")
    snapshotter_option(parser)
    registry_arguments(parser)
    parser.add_argument("image", metavar="IMAGE", help="such as busybox, registry:5000/team/app:1.2 or name@sha256:…")


def _pull(context: Context) -> None:
    from pctr.pulling import pull_image

    args = context.args
    name = pull_image(
        context, args.image, platforms=args.platform, all_platforms=args.all_platforms,
        snapshotter=context.snapshotter, unpack=not args.no_unpack, labels=parse_labels(args.label),
        options=registry_options(args), quiet=args.quiet,
    )
    print(name)


def _push_arguments(parser: Arguments) -> None:
    parser.add_argument("--platform", action="append", default=[], metavar="OS/ARCH", help="push only this platform")
    registry_arguments(parser)
    parser.add_argument("image", metavar="IMAGE", help="name to push to")
    parser.add_argument("local_name", metavar="LOCAL", nargs="?", help="image to push (default: the same name)")


def _push(context: Context) -> None:
    from pctr.image_config import get_image, normalise
    from pctr.pulling import push_image

    args = context.args
    local = get_image(context.client, args.local_name or args.image)
    remote = normalise(args.image) if args.local_name else local.name
    push_image(context, local.name, remote, platforms=args.platform, options=registry_options(args), quiet=args.quiet)
    print(remote)


def _pulls_arguments(parser: Arguments) -> None:
    format_option(parser)
    parser.add_argument("-w", "--watch", action="store_true", help="show again whenever something has changed")


def _pulls(context: Context) -> None:
    from pctr.pulls import show_pulls

    show_pulls(context)


# -- list and look -------------------------------------------------------------------------------------


def _list_arguments(parser: Arguments) -> None:
    format_option(parser, "names")
    filters_argument(parser)


def _list(context: Context) -> None:
    from pctr import image_tree
    from pctr.services import list_images

    client = context.client
    table = output.Table("REF", "TYPE", "DIGEST", "SIZE", "PLATFORMS", "LABELS")
    for image in list_images(client, context.args.filters):
        if getattr(context.args, "quiet", False):
            table.add(image.name, "", "", "", "", "")
            continue
        nodes = list(image_tree.walk(client, image_tree.descriptor_of(image.target)))
        present = image_tree.manifests(nodes)
        platforms = sorted({platform for node in present if (platform := _platform(client, node))})
        table.add(
            image.name, image.target.media_type, image.target.digest, _image_size(nodes, present),
            output.Cell(platforms, ",".join(platforms) or "-"), output.labels(image.labels.items()),
        )
    table.show(context.args)


def _platform(client: Client, manifest: Node) -> str:
    from pctr.image_tree import platform_from_config

    found = platform_from_config(client, manifest)
    return "" if found.startswith("unknown") else found


def _image_size(nodes: list[Node], present: list[Node]) -> output.Cell:
    """What one platform's content takes: this machine's if it is there, else the first."""
    from pctr.image_config import host_platform
    from pctr.image_tree import blobs_of

    if not present:
        return output.Cell(None, "-")
    chosen = next((node for node in present if node.platform in ("", host_platform())), present[0])
    total = chosen.size + sum(int(blob.get("size", 0)) for blob in blobs_of(chosen))
    total += sum(node.size for node in nodes if node.kind == "index")
    return output.size(total)


def _inspect_arguments(parser: Arguments) -> None:
    document_option(parser)
    parser.add_argument("--platform", metavar="OS/ARCH", default="", help="platform to show (default: this machine's)")
    parser.add_argument("images", nargs="+", metavar="IMAGE")


def _inspect(context: Context) -> None:
    from pctr import image_config, image_tree
    from pctr.services import get_image

    client, documents = context.client, []
    for name in context.args.images:
        image = get_image(client, name)
        light_image = image_config.get_image(client, image.name)
        digest, manifest = image_config.read_manifest(client, light_image, context.args.platform)
        config = image_config.read_json(client, manifest["config"]["digest"]) if manifest.get("config") else None
        documents.append({
            "name": image.name, "target": image_tree.descriptor_of(image.target), "labels": dict(image.labels),
            "created_at": output.moment(image.created_at).raw, "updated_at": output.moment(image.updated_at).raw,
            "manifest_digest": digest, "manifest": manifest, "config": config,
        })
    output.document(documents)


def _usage_arguments(parser: Arguments) -> None:
    format_option(parser)
    snapshotter_option(parser)
    parser.add_argument("image", metavar="IMAGE")


def _usage(context: Context) -> None:
    from pctr import image_config
    from pctr.services import snapshot_usage

    client = context.client
    image = image_config.get_image(client, context.args.image)
    config = image_config.load_config(client, image)
    table = output.Table("KEY", "SIZE", "INODES", right=("INODES",))
    total = inodes = 0
    for number in range(len(config.diff_ids), 0, -1):
        key = image_config.chain_id(config.diff_ids[:number])
        usage = snapshot_usage(client, context.snapshotter, key)
        table.add(key, output.size(usage.size), usage.inodes)
        total, inodes = total + usage.size, inodes + usage.inodes
    table.add("total", output.size(total), inodes)
    table.show(context.args)


def _check(context: Context) -> None:
    from pctr.checking import check_images

    check_images(context)


# -- change --------------------------------------------------------------------------------------------


def _remove_arguments(parser: Arguments) -> None:
    parser.add_argument("--sync", action="store_true", help="wait until the space is free")
    parser.add_argument("images", nargs="+", metavar="IMAGE")


def _remove(context: Context) -> int:
    from pctr.image_config import get_image
    from pctr.services import delete_image

    status = 0
    for number, name in enumerate(context.args.images):
        try:
            found = get_image(context.client, name).name
            last = number == len(context.args.images) - 1
            delete_image(context.client, found, sync=context.args.sync and last)
            print(found)
        except errors.NotFound as error:
            output.warn(str(error))
            status = 1
    return status


def _tag_arguments(parser: Arguments) -> None:
    parser.add_argument("-f", "--force", action="store_true", help="move names that exist")
    parser.add_argument("source", metavar="IMAGE")
    parser.add_argument("targets", nargs="+", metavar="NAME")


def _tag(context: Context) -> None:
    from pctr.image_config import normalise
    from pctr.rpc import IMAGES
    from pctr.services import get_image, put_image
    from supervisord_ctr.api.services.images.v1 import images_pb2

    source = get_image(context.client, context.args.source)
    for name in map(normalise, context.args.targets):
        image = images_pb2.Image(name=name, target=source.target, labels=source.labels)
        if context.args.force:
            put_image(context.client, image)
        else:
            context.client.unary(
                IMAGES + "Create", images_pb2.CreateImageRequest(image=image), images_pb2.CreateImageResponse)
        print(name)


def _label_arguments(parser: Arguments) -> None:
    parser.add_argument("--replace-all", action="store_true", help="remove the labels that are not given")
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("labels", nargs="+", metavar="KEY=VALUE", help="an empty value removes the label")


def _label(context: Context) -> None:
    from google.protobuf.field_mask_pb2 import FieldMask

    from pctr.rpc import IMAGES
    from pctr.services import get_image
    from supervisord_ctr.api.services.images.v1 import images_pb2

    labels = parse_labels(context.args.labels)
    image = get_image(context.client, context.args.image)
    paths = ["labels"] if context.args.replace_all else [f"labels.{key}" for key in labels]
    # The target is not changed, but containerd 1.7 dies of an image without one.
    request = images_pb2.UpdateImageRequest(
        image=images_pb2.Image(name=image.name, labels=labels, target=image.target), update_mask=FieldMask(paths=paths))
    changed = context.client.unary(IMAGES + "Update", request, images_pb2.UpdateImageResponse).image
    print(output.labels(changed.labels.items()).text)


def _prune_arguments(parser: Arguments) -> None:
    parser.add_argument("-a", "--all", action="store_true", help="remove every image that no container uses")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")


def _prune(context: Context) -> None:
    from pctr.services import delete_image, list_containers, list_images

    if not context.args.all:
        raise UsageError("nothing is removed without --all: images have no dangling state of their own")
    names = {container.image for container in list_containers(context.client)}
    images = list_images(context.client)
    # A kubelet's images have several names, of which a container states one; pinned ones are not its to lose.
    used = {image.target.digest for image in images if image.name in names}
    unused = [
        image.name for image in images
        if image.target.digest not in used and image.labels.get(_PINNED) != "pinned"
    ]
    for number, name in enumerate(unused):
        if not context.args.dry_run:
            delete_image(context.client, name, sync=number == len(unused) - 1)
        print(name)


# -- archives, mounts, conversion ------------------------------------------------------------------------


def _import_arguments(parser: Arguments) -> None:
    parser.add_argument("--base-name", metavar="NAME", default="", help="name for images that only have a tag")
    parser.add_argument("--index-name", metavar="NAME", default="", help="name for the archive's index as a whole")
    parser.add_argument("--digests", action="store_true", help="also name images by digest")
    parser.add_argument("--platform", metavar="OS/ARCH", default="", help="import only this platform")
    parser.add_argument("--no-unpack", action="store_true", help="only store the content")
    parser.add_argument("--local", action="store_true", help="let pctr, not the daemon, read the archive")
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    snapshotter_option(parser)
    parser.add_argument("file", metavar="FILE", help="tar archive (OCI layout or docker save), - for standard input")


def _import(context: Context) -> None:
    from pctr.archives import import_archive

    for name in import_archive(context, context.args.file):
        print(name)


def _load_arguments(parser: Arguments) -> None:
    parser.add_argument("-i", "--input", metavar="FILE", default="-", help="archive (default: standard input)")
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    parser.add_argument("--platform", metavar="OS/ARCH", default="", help="load only this platform")
    parser.add_argument("--local", action="store_true", help="let pctr, not the daemon, read the archive")
    snapshotter_option(parser)


def _load(context: Context) -> None:
    from pctr.archives import import_archive

    args = context.args
    args.base_name, args.index_name, args.digests, args.no_unpack = "", "", False, False
    for name in import_archive(context, args.input):
        print(name)


def _export_arguments(parser: Arguments) -> None:
    parser.add_argument("--platform", action="append", default=[], metavar="OS/ARCH", help="export this platform")
    parser.add_argument("--all-platforms", action="store_true", help="export every platform that is there")
    parser.add_argument("--local", action="store_true", help="let pctr, not the daemon, write the archive")
    parser.add_argument("file", metavar="FILE", help="archive to write, - for standard output")
    parser.add_argument("images", nargs="+", metavar="IMAGE")


def _export(context: Context) -> None:
    from pctr.archives import export_archive

    export_archive(context, context.args.file, context.args.images)


def _save_arguments(parser: Arguments) -> None:
    parser.add_argument("-o", "--output", metavar="FILE", default="-", help="archive (default: standard output)")
    parser.add_argument("--platform", action="append", default=[], metavar="OS/ARCH", help="save this platform")
    parser.add_argument("--all-platforms", action="store_true", help="save every platform that is there")
    parser.add_argument("--local", action="store_true", help="let pctr, not the daemon, write the archive")
    parser.add_argument("images", nargs="+", metavar="IMAGE")


def _save(context: Context) -> None:
    from pctr.archives import export_archive

    if context.args.output == "-":
        import sys

        if sys.stdout.isatty():
            raise Failed("an archive does not belong on a terminal: use --output FILE")
    export_archive(context, context.args.output, context.args.images)


def _mount_arguments(parser: Arguments) -> None:
    parser.add_argument("--rw", action="store_true", help="writable; the changes go when it is unmounted")
    parser.add_argument("--platform", metavar="OS/ARCH", default="", help="platform to mount")
    snapshotter_option(parser)
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("target", metavar="FOLDER")


def _mount(context: Context) -> None:
    from pctr.mounting import mount_image

    mount_image(context)


def _unmount_arguments(parser: Arguments) -> None:
    parser.add_argument("--rm", action="store_true", help="remove the snapshot too")
    snapshotter_option(parser)
    parser.add_argument("target", metavar="FOLDER")


def _unmount(context: Context) -> None:
    from pctr.mounting import unmount_image

    unmount_image(context)


def _unpack_arguments(parser: Arguments) -> None:
    parser.add_argument("--platform", metavar="OS/ARCH", default="", help="platform to unpack")
    snapshotter_option(parser)
    parser.add_argument("image", metavar="IMAGE")


def _unpack(context: Context) -> None:
    from pctr import image_config
    from pctr.unpack import unpack

    client = context.client
    image = image_config.get_image(client, context.args.image)
    config = image_config.load_config(client, image, context.args.platform)
    manifest = image_config.read_json(client, config.manifest_digest)
    print(unpack(client, config.manifest_digest, config.diff_ids, manifest, context.snapshotter))


def _convert_arguments(parser: Arguments) -> None:
    parser.add_argument("--oci", action="store_true", help="Docker media types to OCI ones")
    parser.add_argument("--uncompress", action="store_true", help="layers as plain tar")
    parser.add_argument("--platform", action="append", default=[], metavar="OS/ARCH", help="keep only this platform")
    parser.add_argument("source", metavar="IMAGE")
    parser.add_argument("target", metavar="NAME")


def _convert(context: Context) -> None:
    from pctr.converting import convert

    print(convert(context))


COMMANDS = (
    Command("pull", "fetch an image and unpack it", "pctr image pull docker.io/library/busybox:latest",
            _pull_arguments, _pull),
    Command("push", "send an image to a registry", "pctr image push registry:5000/app:1 docker.io/library/app:1",
            _push_arguments, _push),
    Command("pulls", "show what is being pulled right now", "pctr -n k8s.io image pulls --watch",
            _pulls_arguments, _pulls),
    Command("ls", "list images", "pctr image ls 'name~=busybox'", _list_arguments, _list, ("list",)),
    Command("inspect", "print an image's record, manifest and config as JSON",
            "pctr image inspect docker.io/library/busybox:latest", _inspect_arguments, _inspect, ("info",)),
    Command("usage", "show what each layer takes on disk", "pctr image usage busybox", _usage_arguments, _usage),
    Command("check", "tell which content and snapshots of images are there", "pctr image check", _list_arguments,
            _check),
    Command("rm", "remove images", "pctr image rm --sync busybox", _remove_arguments, _remove,
            ("remove", "delete", "del")),
    Command("tag", "give an image another name", "pctr image tag busybox registry:5000/busybox:mine",
            _tag_arguments, _tag),
    Command("label", "change an image's labels", "pctr image label busybox team=web", _label_arguments, _label),
    Command("prune", "remove images that no container uses", "pctr image prune --all --dry-run", _prune_arguments,
            _prune),
    Command("import", "read images from an archive", "pctr image import busybox.tar", _import_arguments, _import),
    Command("export", "write images to an archive", "pctr image export busybox.tar busybox", _export_arguments,
            _export),
    Command("load", "read images from standard input or a file", "pctr image load -i busybox.tar", _load_arguments,
            _load),
    Command("save", "write images to standard output or a file", "pctr image save -o busybox.tar busybox",
            _save_arguments, _save),
    Command("mount", "mount an image's root file system", "pctr image mount busybox /mnt", _mount_arguments, _mount),
    Command("unmount", "unmount what 'image mount' mounted", "pctr image unmount --rm /mnt", _unmount_arguments,
            _unmount, ("umount",)),
    Command("unpack", "make the snapshots of an image", "pctr image unpack busybox", _unpack_arguments, _unpack),
    Command("convert", "make a changed copy of an image", "pctr image convert --oci --uncompress busybox busybox:plain",
            _convert_arguments, _convert),
)
