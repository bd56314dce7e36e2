"""The keeper by itself, in a process of its own: what it makes of a worker that is gone before it is looked at."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

_PROGRAM = """
import os, signal, socket, sys
from pctr_shim import keeper
from pctr_shim.signals import Signals
daemon, ours = keeper.socketpair()
made = keeper.Keeper(Signals())
made._daemon = ours.fileno()
post = made._fork()
if post is not None:
    for packet in sys.argv[1:]:
        post.keeper.send(packet.encode())
    os.kill(os.getpid(), signal.SIGKILL)
os.waitid(os.P_PID, made._worker, os.WEXITED | os.WNOWAIT)
print(made._attend())
daemon.setblocking(False)
try:
    print(daemon.recv(1024).decode())
except BlockingIOError:
    print("nothing")
"""


@pytest.mark.parametrize(("said", "replied"), [(["S17"], 17), (["S17", "S18"], 18), ([], None)])
def test_p13_what_a_worker_said_before_its_end_is_heard(said: list[str], replied: int | None) -> None:
    """Whoever asked for a shim is told that it will not come, also when its end is seen first."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *said], capture_output=True, text=True, timeout=60, check=True
    )
    handed_over, reply = done.stdout.splitlines()
    assert handed_over == "False"
    if replied is None:
        assert reply == "nothing"
    else:
        assert (json.loads(reply)["serial"], json.loads(reply)["error"]["code"]) == (replied, 14)
