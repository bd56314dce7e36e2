"""Sandboxes: the environment of a pod, made of pinned namespaces, a few files and a network.

Owns the namespaces of a pod (bind mounts, no process), its `hostname`, `hosts`, `resolv.conf` and
`/dev/shm`, its sysctls, the process that holds a shared PID namespace, and its network by CNI or by
the embedded bridge. Does not know CRI messages, containers or images: the CRI room translates.
"""
