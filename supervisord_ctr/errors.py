"""Errors: one class for each canonical status, raised with a message that names the object.

Owns the vocabulary of failure. Does not know gRPC or ttrpc: each has one adapter (`rpc.py`,
`ttrpc/server.py`) that turns these into statuses by their `code`.

The numbers are those of `google.rpc.Code`, which gRPC and ttrpc share.
"""

from __future__ import annotations

import errno as errno_module

# Stated, not imported: a client that starts often shall not load the typing module for this.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar


class Code:
    """Canonical status codes (google/rpc/code.proto): plain numbers, as the enum module takes long to load."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class Error(Exception):
    """Base of every error that a peer may see.

    `message` is lower case, without a full stop, and names the object and the path. `kind` and
    `key` name the object for logs and for callers that decide by it ("image", "docker.io/…").
    """

    code: ClassVar[int] = Code.UNKNOWN

    def __init__(self, message: str, *, kind: str = "", key: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.kind = kind
        self.key = key


class Unknown(Error):
    """A failure of which nothing more is known."""


class Cancelled(Error):
    """The operation was called off by its caller."""

    code = Code.CANCELLED


class InvalidArgument(Error):
    """The request itself is wrong, whatever the state."""

    code = Code.INVALID_ARGUMENT


class DeadlineExceeded(Error):
    """The time given ran out."""

    code = Code.DEADLINE_EXCEEDED


class NotFound(Error):
    """No such object."""

    code = Code.NOT_FOUND


class AlreadyExists(Error):
    """An object of that name exists."""

    code = Code.ALREADY_EXISTS


class PermissionDenied(Error):
    """The caller may not do that."""

    code = Code.PERMISSION_DENIED


class ResourceExhausted(Error):
    """A quota, a limit or the disk is used up."""

    code = Code.RESOURCE_EXHAUSTED


class FailedPrecondition(Error):
    """The object is not in a state that allows it."""

    code = Code.FAILED_PRECONDITION


class Aborted(Error):
    """A conflict; the whole transaction may be tried again."""

    code = Code.ABORTED


class OutOfRange(Error):
    """An offset or size beyond what is there."""

    code = Code.OUT_OF_RANGE


class Unimplemented(Error):
    """Not offered by this part."""

    code = Code.UNIMPLEMENTED


class Internal(Error):
    """An invariant is broken."""

    code = Code.INTERNAL


class Unavailable(Error):
    """Not now; trying again may help. Also: a lock is held."""

    code = Code.UNAVAILABLE


class DataLoss(Error):
    """Stored data is damaged."""

    code = Code.DATA_LOSS


class Unauthenticated(Error):
    """Credentials are missing or refused."""

    code = Code.UNAUTHENTICATED


_BY_CODE: dict[int, type[Error]] = {
    cls.code: cls
    for cls in (
        Unknown, Cancelled, InvalidArgument, DeadlineExceeded, NotFound, AlreadyExists, PermissionDenied,
        ResourceExhausted, FailedPrecondition, Aborted, OutOfRange, Unimplemented, Internal, Unavailable,
        DataLoss, Unauthenticated,
    )
}


def from_code(code: int, message: str) -> Error:
    """The error for a status that a peer sent; codes outside the table become `Unknown`."""
    return _BY_CODE.get(code, Unknown)(message)


_BY_ERRNO: dict[int, type[Error]] = {
    errno_module.ENOENT: NotFound,
    errno_module.EEXIST: AlreadyExists,
    errno_module.EACCES: PermissionDenied,
    errno_module.EPERM: PermissionDenied,
    errno_module.ENOSPC: ResourceExhausted,
    errno_module.EDQUOT: ResourceExhausted,
    errno_module.EMFILE: ResourceExhausted,
    errno_module.ENFILE: ResourceExhausted,
    errno_module.EBUSY: FailedPrecondition,
    errno_module.ENOTEMPTY: FailedPrecondition,
    errno_module.EINVAL: InvalidArgument,
    errno_module.ENAMETOOLONG: InvalidArgument,
}


def from_os_error(error: OSError, doing: str) -> Error:
    """Translate an `OSError` where it happened: `doing` says what, the errno and path are kept.

    The result carries the original as `__cause__`, so `error.__cause__.errno` stays readable.
    """
    cls = _BY_ERRNO.get(error.errno or 0, Unknown)
    path = f" {error.filename}" if error.filename else ""
    number = errno_module.errorcode.get(error.errno or 0, str(error.errno))
    result = cls(f"{doing}{path}: {(error.strerror or str(error)).lower()} ({number})")
    result.__cause__ = error
    return result
