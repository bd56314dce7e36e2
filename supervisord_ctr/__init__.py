"""The daemon of supervisord-ctr: images, snapshots, containers and their running tasks."""

__version__ = "0.1.0"
