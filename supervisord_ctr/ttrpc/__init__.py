"""ttrpc: the small RPC that containerd and its shims speak over a Unix socket.

`wire` frames, `client` calls, `server` answers. Wire-compatible with containerd/ttrpc 1.2 (unary and
streaming). Knows no service: the shim and the daemon bring theirs.
"""
