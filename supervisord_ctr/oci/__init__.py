"""OCI runtime configuration: what goes into a bundle's `config.json`.

Owns the defaults (`spec`), users inside a root file system (`users`), capability names
(`capabilities`), the default seccomp profile (`seccomp`), device nodes (`devices`), limits that
this machine can honour (`limits`) and CDI devices (`cdi`).

Everything here is plain functions over plain dictionaries: no daemon, no asyncio, no protobuf, so
that `pctr` builds its specs with the same code as the CRI service. Does not run anything and does
not write bundles; that is `runtime/`.

Source: OCI runtime specification 1.1 (config.md, config-linux.md).
"""
