"""CRI v1: what a kubelet needs of the daemon, over the same stores that the native face uses.

One file per concern. `service.py` and `image_service.py` are the gRPC faces and hold no logic;
`core.py` is what every concern gets handed; `state.py` is the memory that lists and statuses are
answered from (D9: no disk, no shim, no lock that a slow container can hold).
"""
