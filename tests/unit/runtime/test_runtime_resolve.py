"""Runtime names, and what shims print when they start."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from supervisord_ctr.api.runtime.bootstrap.v1 import bootstrap_pb2
from supervisord_ctr.errors import Error, InvalidArgument, NotFound, Unimplemented
from supervisord_ctr.runtime import resolve
from supervisord_ctr.runtime.shims import parse_start


@pytest.mark.parametrize(("name", "binary"), [
    ("io.containerd.runc.v2", "containerd-shim-runc-v2"),
    ("io.containerd.kata-qemu.v2", "containerd-shim-kata-qemu-v2"),
    ("runsc.v1", "containerd-shim-runsc-v1"),
])
def test_names_become_programs(name: str, binary: str) -> None:
    assert resolve.binary_name(name) == binary


@pytest.mark.parametrize("name", ["runc", "", ".v1", "a/b.c", "io.containerd.", "io..v1"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgument):
        resolve.binary_name(name)


def test_programs_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "containerd-shim-mine-v9"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert resolve.find("io.containerd.mine.v9") == str(program)
    assert resolve.find(str(program)) == str(program)
    with pytest.raises(NotFound):
        resolve.find("io.containerd.not-there.v9")
    with pytest.raises(NotFound):
        resolve.find(str(tmp_path / "gone"))


def test_every_form_of_answer_is_read() -> None:
    assert parse_start(b"unix:///run/s/1\n") == ("unix:///run/s/1", "ttrpc", 2)
    assert parse_start(b"time=now msg=hello\nunix:///run/s/1") == ("unix:///run/s/1", "ttrpc", 2)
    text = json.dumps({"version": 3, "address": "unix:///run/s/2", "protocol": "ttrpc"}).encode()
    assert parse_start(text) == ("unix:///run/s/2", "ttrpc", 3)
    message = bootstrap_pb2.BootstrapResult(version=3, address="unix:///run/s/3", protocol="ttrpc")
    assert parse_start(message.SerializeToString()) == ("unix:///run/s/3", "ttrpc", 3)


@pytest.mark.parametrize("text", [
    b'{"version": 4, "address": "unix:///x", "protocol": "ttrpc"}',
    b'{"version": 3, "address": "unix:///x", "protocol": "grpc"}',
    b'{"version": 3, "address": "vsock://3:4", "protocol": "ttrpc"}',
    b"unix://@abstract", b"", b"{",
])
def test_s13_other_answers_are_refused(text: bytes) -> None:
    with pytest.raises(Error) as caught:
        parse_start(text)
    assert isinstance(caught.value, Unimplemented) or text == b"{"
