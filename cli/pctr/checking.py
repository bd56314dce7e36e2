"""`pctr image check`: which of an image's content and snapshots are there."""

from __future__ import annotations

from pctr import image_config, image_tree, output
from pctr.command import Context
from pctr.rpc import Client
from pctr.services import content_info, list_images, stat_snapshot
from supervisord_ctr import errors


def check_images(context: Context) -> None:
    """Print one row for each image: what is there, what is missing, whether it is unpacked."""
    client = context.client
    table = output.Table("REF", "TYPE", "DIGEST", "STATUS", "SIZE", "UNPACKED")
    for image in list_images(client, context.args.filters):
        status, there, total = _content(client, image.target)
        unpacked = _unpacked(client, image.name, context.snapshotter)
        size = output.Cell({"present": there, "total": total},
                           f"{output.human_size(there)}/{output.human_size(total)}")
        table.add(image.name, image.target.media_type, image.target.digest, status, size,
                  output.Cell(unpacked, "true" if unpacked else "false"))
    table.show(context.args)


def _content(client: Client, target: object) -> tuple[str, int, int]:
    nodes = list(image_tree.walk(client, image_tree.descriptor_of(target)))
    host = image_config.host_platform()
    present = image_tree.manifests(nodes)
    if not present:
        return "incomplete", 0, 0
    chosen = next((node for node in present if node.platform in ("", host)), present[0])
    blobs = image_tree.blobs_of(chosen)
    there = total = found = 0
    for blob in blobs:
        total += int(blob.get("size", 0))
        try:
            there += content_info(client, str(blob["digest"])).size
            found += 1
        except errors.NotFound:
            continue
    word = "complete" if found == len(blobs) else "incomplete"
    return f"{word} ({found}/{len(blobs)})", there, total


def _unpacked(client: Client, name: str, snapshotter: str) -> bool:
    try:
        config = image_config.load_config(client, image_config.get_image(client, name))
        if config.chain_id:
            stat_snapshot(client, snapshotter, config.chain_id)
    except errors.NotFound:
        return False
    return True
