"""What a shim leaves out: TLS, which asyncio does without where it is absent. Import this before anything else.

A process that has loaded `ssl` keeps it.
"""

from __future__ import annotations

import sys

sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]
