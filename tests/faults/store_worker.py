"""The process that the fault tests kill: works on stores below argv[1] and says what was acknowledged.

Each line of its output is "VERB ARGUMENT" and is written only after the call returned; what a line
says must be true after any crash that follows.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from supervisord_ctr.errors import NotFound
from supervisord_ctr.model import Container, Descriptor, Image, Runtime, TypedValue
from tests.support.stores import Stores, open_stores


def say(verb: str, argument: str) -> None:
    sys.stdout.write(f"{verb} {argument}\n")
    sys.stdout.flush()


async def turn(stores: Stores, number: int) -> None:
    """One image pulled, unpacked, run, and the one two turns before removed again."""
    database = stores.database
    overlay = database.snapshotter("overlayfs")
    lease = f"lease-{number}"
    await database.leases.create("ns", lease)
    aborted = await database.content.writer("ns", f"aborted-{number}", lease=lease)
    await aborted.write(b"x")
    await aborted.close()
    await database.content.abort("ns", f"aborted-{number}", lease=lease)
    left = await database.content.writer("ns", f"left-{number}", lease=lease)
    await left.write(b"x")
    await left.close()
    layer = await stores.blob("ns", f"layer {number}".encode(), lease=lease)
    say("blob", layer)
    manifest = await stores.blob(
        "ns", f"manifest {number}".encode(), {"containerd.io/gc.ref.content.0": layer}, lease=lease
    )
    say("blob", manifest)
    await overlay.prepare("ns", f"extract-{number}", "", lease=lease)
    upper = await overlay.upper_dir("ns", f"extract-{number}")
    assert upper is not None
    (upper / "file").write_text(str(number))
    await overlay.commit("ns", f"chain-{number}", f"extract-{number}", lease=lease)
    say("layer", f"chain-{number}")
    await overlay.prepare("ns", f"run-{number}", f"chain-{number}", lease=lease)
    await database.containers.create("ns", Container(
        f"c{number}", {}, f"image-{number}", Runtime("r"), TypedValue("s", b"{}"), "overlayfs", f"run-{number}"
    ))
    say("container", f"c{number}")
    await database.images.create("ns", Image(f"image-{number}", Descriptor("m", manifest, 10)))
    say("image", f"image-{number}")
    await database.leases.delete("ns", lease)
    if number >= 2:
        old = number - 2
        say("remove", str(old))
        for work in (database.containers.delete("ns", f"c{old}"), database.images.delete("ns", f"image-{old}")):
            try:
                await work
            except NotFound:
                pass
        await database.gc.collect()


async def main(root: Path, start: int, turns: int) -> None:
    async with open_stores(root, sync=True) as stores:
        say("open", "")
        for number in range(start, start + turns):
            await turn(stores, number)
    say("end", "")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
