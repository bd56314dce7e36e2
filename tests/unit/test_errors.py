"""Errors: one class for each status, and what the system's errors become."""

from __future__ import annotations

import errno

import pytest

from supervisord_ctr import errors


def test_every_code_but_ok_has_a_class() -> None:
    codes = [value for name, value in vars(errors.Code).items() if name.isupper()]
    assert codes == list(range(17))
    assert [errors.from_code(code, "x").code for code in codes[1:]] == codes[1:]
    assert type(errors.from_code(errors.Code.OK, "x")) is errors.Unknown


def test_codes_outside_the_table_become_unknown() -> None:
    assert type(errors.from_code(99, "x")) is errors.Unknown


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOENT, errors.NotFound),
        (errno.EEXIST, errors.AlreadyExists),
        (errno.ENOSPC, errors.ResourceExhausted),
        (errno.EACCES, errors.PermissionDenied),
        (errno.EBUSY, errors.FailedPrecondition),
        (errno.EIO, errors.Unknown),
    ],
)
def test_system_errors_keep_number_and_path(number: int, kind: type[errors.Error]) -> None:
    original = OSError(number, "Some Text", "/some/path")
    error = errors.from_os_error(original, "cannot open")
    assert type(error) is kind
    assert error.__cause__ is original
    assert error.message == f"cannot open /some/path: some text ({errno.errorcode[number]})"
