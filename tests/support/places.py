"""Where tests make folders that pytest does not make for them."""

from __future__ import annotations

import os

#: A folder with a short path, since sockets' paths hold 107 bytes; where /tmp will not do, `conftest` names another.
SHORT = os.environ.get("PYTEST_DEBUG_TEMPROOT", "/tmp")
