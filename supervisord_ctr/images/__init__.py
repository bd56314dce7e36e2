"""Images: references, registries, pulls, pushes, archives.

Owns everything between a name like `busybox` and committed snapshots with an image record. Stores
nothing itself (`metadata` does) and unpacks nothing itself (`diff` does). Importing this package is
cheap; `aiohttp` is loaded by the first pull or push.
"""
