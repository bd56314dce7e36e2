"""Diff: layers as tar streams, into directories (`apply`, in worker processes: `pool`) and out of them (`compute`).

Owns the tar format, compression, confinement of what a layer names, whiteouts. Does not know
images, registries or metadata; mounts only what a caller hands it.
"""
