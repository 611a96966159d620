"""Bad input, told apart from bugs.

Only what a user can put right becomes an `InputError`; everything else keeps its traceback. Rejected: catching
`ValueError` around a whole command, which would hide a failure in the middle of training behind one line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """A setting, file or data set that cannot be used; its message names it and what to do."""


@contextlib.contextmanager
def input_errors() -> Iterator[None]:
    """While arguments are parsed, data is loaded and the trainer is built: errors of the libraries about values and
    files are about input."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, OSError, KeyError, ImportError) as error:
        text = f"missing key {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(text or type(error).__name__) from error


def one_line(error: BaseException) -> str:
    """The message on one line."""
    return " ".join(str(error).split())


def first_line(error: BaseException) -> str:
    """The first line of a library's message, or the name of an error that has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
