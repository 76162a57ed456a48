"""The error classes and their codes on the wire."""

from __future__ import annotations

import builtins
import errno
import inspect
import pickle

import pytest

import mochi.warabi.client
import mochi.warabi.server
from warabi import errors
from warabi.protocol import wire

CLASSES = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, errors.Exception) and cls is not errors.Exception
]


def test_there_is_one_base() -> None:
    assert issubclass(errors.Exception, builtins.Exception)
    assert mochi.warabi.client.Exception is mochi.warabi.server.Exception is errors.Exception
    assert not issubclass(errors.WouldBlock, errors.Exception)


PATH_ERRORS = {
    errors.PathError: errno.ENOTEMPTY,
    errors.PathNotFound: errno.ENOENT,
    errors.PathExists: errno.EEXIST,
    errors.PathNotADirectory: errno.ENOTDIR,
    errors.PathIsADirectory: errno.EISDIR,
    errors.PathNotPermitted: errno.EPERM,
}


def made(cls: type[errors.Exception]) -> errors.Exception:
    """An error of that class."""
    if issubclass(cls, errors.PathError):
        return errors.PathError(PATH_ERRORS[cls], "the message")
    return cls("the message")


@pytest.mark.parametrize("cls", PATH_ERRORS)
def test_an_error_of_a_path_is_pythons_own_too(cls: type[errors.PathError]) -> None:
    number = PATH_ERRORS[cls]
    assert isinstance(errors.path_error(number), type(OSError(number, "")))


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_crosses_the_wire(cls: type[errors.Exception]) -> None:
    error = made(cls)
    code, message, number = wire.unpack(wire.pack(errors.to_wire(error)))
    back = errors.from_wire(code, message, number)
    assert type(back) is cls
    assert str(back) == "the message"
    assert getattr(back, "errno", None) == getattr(error, "errno", None)


def test_codes_are_distinct() -> None:
    codes = {errors.to_wire(made(cls))[::2] for cls in CLASSES}
    assert len(codes) == len(CLASSES)


def test_unknown_code_and_class() -> None:
    assert type(errors.from_wire("of the future", "x", 0)) is errors.ProviderFailed

    class Own(errors.Exception):
        pass

    assert errors.to_wire(Own("x"))[0] == "failed"


@pytest.mark.parametrize("cls", CLASSES)
def test_pickles(cls: type[errors.Exception]) -> None:
    """Exceptions cross process pools."""
    error = made(cls)
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is cls
    assert str(back) == str(error) == "the message"


def test_builtin_classes_that_callers_may_expect() -> None:
    assert issubclass(errors.InvalidRegion, ValueError)
    assert issubclass(errors.OutOfBounds, ValueError)
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.InvalidBuffer, TypeError)
    assert issubclass(errors.InvalidBuffer, BufferError)
    assert issubclass(errors.PathError, OSError)


@pytest.mark.parametrize(
    ("number", "cls"),
    [
        (errno.ENOSPC, errors.StorageFull),
        (errno.EDQUOT, errors.StorageFull),
        (errno.ENOMEM, errors.StorageFull),
        (errno.EMFILE, errors.StorageError),
        (errno.ENFILE, errors.StorageError),
        (errno.EFBIG, errors.OutOfBounds),
        (errno.EACCES, errors.PermissionDenied),
        (errno.EPERM, errors.PermissionDenied),
        (errno.EROFS, errors.PermissionDenied),
        (errno.EIO, errors.StorageError),
        (errno.EBADF, errors.StorageError),
    ],
)
def test_failed_system_calls(number: int, cls: type[errors.Exception]) -> None:
    error = errors.from_os(OSError(number, "reason"), "what failed")
    assert type(error) is cls
    assert str(error).startswith("what failed: reason")


def test_path_error_without_words_has_the_systems() -> None:
    error = errors.path_error(errno.ENOTDIR)
    assert error.errno == errno.ENOTDIR
    assert str(error) == "Not a directory"
