"""The shim: what a container's life depends on while daemons come and go.

Runs as a fork of the zygote (`zygote.py`) for our daemon, or by itself as `containerd-shim-pctr-v1`
(`__main__.py`) for a foreign one. Stands on floors 0 and 1 of `supervisord_ctr` and never imports
grpc.
"""

__version__ = "0.1.0"
