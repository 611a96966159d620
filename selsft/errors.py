"""Bad input, told apart from bugs.

Only what a user can fix becomes an `InputError`; everything else keeps its traceback. Rejected: catching
`ValueError` around a whole command, which would hide a failure in the middle of training behind one line.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator

_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
# How libraries in C++ and Rust word the number of an error: "Os { code: 28, ...", "(os error 28)", "[Errno 28]"
_NUMBER = re.compile(r"(?:\bcode: |\bos error |\berrno )(\d+)", re.IGNORECASE)
# PyTorch's writer of zip files keeps no number
_TORCH = ("file write failed", "unexpected pos")


class InputError(ValueError):
    """A setting, file or data set that cannot be used; its message names it and what to do."""


def check_type(argument: str, value: object, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Raise `InputError`, naming the argument, for a value of none of `kinds`."""
    if not isinstance(value, kinds):
        raise InputError(f"{argument} is a {type(value).__name__}: give {wanted}")


@contextlib.contextmanager
def input_errors() -> Iterator[None]:
    """While arguments are parsed, data is loaded and the trainer is built: errors of the libraries about values and
    files are about input."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, OSError, KeyError, ImportError) as error:
        if failed_write(error):  # `records.resumable` names the folder that is being filled
            raise
        text = f"missing key {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(text or type(error).__name__) from error


def failed_write(error: BaseException | None) -> str | None:
    """What kept a file from being written, in words: no room, no permission. `None` for every other error.

    Looks through causes as well, and at the texts of errors of libraries that keep the number of the system's error.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        numbers = [error.errno] if isinstance(error, OSError) and error.errno else _numbers(str(error))
        for number in numbers:
            if number in _WRITING:
                name = error.filename if isinstance(error, OSError) else None
                return os.strerror(number) + (f": {str(name)!r}" if name else "")
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _TORCH):
            return "a file could not be written to its end"
        error = error.__cause__ or error.__context__
    return None


def _numbers(text: str) -> list[int]:
    return [int(number) for number in _NUMBER.findall(text)]


def one_line(error: BaseException) -> str:
    """The message on one line."""
    return " ".join(str(error).split())


def first_line(error: BaseException) -> str:
    """The first line of a library's message, or the name of an error that has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
