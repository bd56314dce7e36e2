"""What every suite shares: generated cases have no deadline, since a loaded machine says nothing about the code."""

from __future__ import annotations

import os
import signal
import tempfile

from hypothesis import HealthCheck, settings

settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.load_profile("steady")

# A shell that runs the tests in the background has it ignored, and so would every program that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _keeps_attributes(folder: str) -> bool:
    """Whether files there can have attributes of users, as files of images have; on a tmpfs from Linux 6.6 on only."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        try:
            os.setxattr(file.fileno(), "user.note", b"")
        except OSError:
            return False
    return True


if not _keeps_attributes(tempfile.gettempdir()) and _keeps_attributes("/var/tmp"):
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/var/tmp")
