"""The SQLite file: one writer thread with group commit, readers, migrations, damage. (Interface; being filled.)"""

from __future__ import annotations

from pathlib import Path

from supervisord_ctr.snapshots import Records


class Engine:
    """One database file. Plain to construct; nothing is opened before `open`.

    daemon.py:
        engine = Engine(root / "metadata.db")
        overlay = OverlaySnapshotter(root / "snapshots/overlayfs", engine.records("overlayfs"), executors)
        database = Database(engine, content, {"overlayfs": overlay, ...}, exchange.publish, executors)
        await database.open()      # opens the engine and the snapshotters, too
        await database.close()     # closes all of them
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def records(self, snapshotter: str) -> Records:
        """Where the local snapshotter of that name keeps its records."""
        raise NotImplementedError
