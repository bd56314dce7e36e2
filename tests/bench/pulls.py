"""Pull and unpack, cold and again, through CRI and by command; and what curl, gzip and tar take."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.bench.client import CRI_NAMESPACE
from tests.bench.images import INDEX, MANIFEST
from tests.bench.measure import Case, Row, Session, Values, timed
from tests.bench.subjects import Subject

PIPELINE = """set -o pipefail
mkfifo "$2.packed" "$2.plain"
$SUM < "$2.packed" > /dev/null & one=$!
$SUM < "$2.plain" > /dev/null & two=$!
curl -sSf "$1" | tee "$2.blob" "$2.packed" | $UNPACK | tee "$2.plain" | tar -x --no-same-owner -C "$2" -f -
wait $one $two
rm -f "$2.packed" "$2.plain"
"""


class Pull(Case):
    """One image through CRI's PullImage: cold, and again with everything present."""

    def __init__(self, image: str, goal: float) -> None:
        short = image.rpartition("/")[2]
        self.image, self.name = image, f"pull-{short}"
        self.text = f"PullImage of {image}, nothing of it present; and again with all of it present"
        self.cold, self.warm = f"pull {image}", f"pull {image} again"
        self.rows = (Row(self.cold, "s", goal), Row(self.warm, "s"))

    def measure(self, session: Session, subject: Subject) -> Values:
        reference = session.reference(self.image)
        os.sync()
        cold = timed(lambda: subject.client.pull(reference))
        warm = timed(lambda: subject.client.pull(reference))
        subject.client.remove_image(reference)
        if left := subject.client.blobs(CRI_NAMESPACE):
            pause = len(session.images["bench/pause"].layers) + 3
            if left > pause:
                raise RuntimeError(f"{left} blobs left after the image was removed: the next pull would not be cold")
        return {self.cold: cold, self.warm: warm}

    def limit(self, session: Session) -> Values:
        if shutil.which("curl") is None:
            return {}
        layers = _layers(session.registry, self.image)
        folder = session.work / "limit"
        folder.mkdir()
        os.sync()
        try:
            return {self.cold: timed(lambda: _by_hand(session.registry, self.image, layers, folder))}
        finally:
            shutil.rmtree(folder)

    def done(self, session: Session, subject: Subject) -> None:
        subject.client.collect(CRI_NAMESPACE)


class PullCommand(Case):
    """One image by the daemon's command line client, as a whole process."""

    def __init__(self, image: str, goal: float) -> None:
        self.image, self.name = image, f"command-pull-{image.rpartition('/')[2]}"
        self.text = f"pctr image pull and ctr images pull of {image}"
        self.row = f"command: pull {image}"
        self.rows = (Row(self.row, "s", goal),)

    def measure(self, session: Session, subject: Subject) -> Values:
        reference, space = session.reference(self.image), "bench-pull"
        os.sync()
        taken = timed(lambda: subject.run("--namespace", space, *subject.pull_words, reference))
        subject.run("--namespace", space, *subject.remove_words, reference)
        subject.client.collect(space)
        if left := subject.client.blobs(space):
            raise RuntimeError(f"{left} blobs left after the image was removed: the next pull would not be cold")
        return {self.row: taken}


def _get(registry: str, image: str, tag: str, kind: str) -> dict[str, object]:
    request = urllib.request.Request(f"http://{registry}/v2/{image}/manifests/{tag}", headers={"Accept": kind})
    with urllib.request.urlopen(request, timeout=30) as answer:
        found = json.load(answer)
    return dict(found)


def _layers(registry: str, image: str) -> list[str]:
    index = _get(registry, image, "latest", INDEX)
    manifest = _get(registry, image, index["manifests"][0]["digest"], MANIFEST)  # type: ignore[index]
    return [layer["digest"] for layer in manifest["layers"]]  # type: ignore[attr-defined]


def _by_hand(registry: str, image: str, layers: list[str], folder: Path) -> None:
    """Download, hash twice, inflate, untar and keep the blob, two layers side by side; then one sync."""
    tools = {"SUM": "openssl dgst -sha256" if shutil.which("openssl") else "sha256sum",
             "UNPACK": "igzip -d -c" if shutil.which("igzip") else "gzip -d -c"}

    def one(number: int, digest: str) -> None:
        target = folder / str(number)
        target.mkdir()
        command = ["bash", "-c", PIPELINE, "limit", f"http://{registry}/v2/{image}/blobs/{digest}", str(target)]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, **tools}, timeout=600)

    with ThreadPoolExecutor(max_workers=2) as pool:
        for job in [pool.submit(one, number, digest) for number, digest in enumerate(layers)]:
            job.result()
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
