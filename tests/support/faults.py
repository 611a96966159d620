"""Writes that fail: no room, no permission, Ctrl-C, at a chosen one of all that a process makes below a folder.

An audit hook sees what Python opens, renames and creates; libraries that write through C++ or Rust are told on by
wrappers. No room is the limit of the system on the size of a file, so that every library meets its real error, and a
file that is cut off in its middle. Rejected: patching the writers of selsft, which are a part of those that write.
"""

from __future__ import annotations

import errno
import functools
import os
import resource
import sys
from pathlib import Path
from typing import Any

KINDS = ("full", "denied", "interrupted")
_EVENTS = {"open", "os.mkdir", "os.rename", "os.symlink", "selsft.write"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_ROOM = 100  # bytes of a file that fit on a "full" disk, so that what is longer is cut off


class Faults:
    """Counts the writes of this process below `folder` and lets them fail from number `at` on, Ctrl-C only once.

    For processes that end after it: a hook cannot be taken away.

    Args:
        at: the first write is 1; `None` counts alone.
    """

    def __init__(self, folder: Path, kind: str = "full", at: int | None = None, log: Path | None = None):
        self.folder, self.kind, self.at, self.count, self.log = str(folder), kind, at, 0, log
        self.active = True
        _tell()
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if event not in _EVENTS or not self.active:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITING):
            return
        path = (
            os.path.abspath(os.fsdecode(arguments[0])) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
        )
        if not path.startswith(self.folder):
            return
        self.count += 1
        if self.at is None or self.count < self.at:
            return
        if self.kind == "interrupted":
            if self.count == self.at:
                raise KeyboardInterrupt
        elif self.kind == "denied":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        else:
            if self.count == self.at:
                resource.setrlimit(resource.RLIMIT_FSIZE, (_ROOM, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            if event in ("os.mkdir", "os.symlink"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def _tell() -> None:
    """Make the libraries that open files outside of Python say so."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import safetensors.torch
    import torch
    import transformers

    def wrap(owner: Any, name: str, path_of) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def told(*args, **kwargs):
            path = path_of(*args, **kwargs)
            if isinstance(path, str | os.PathLike):
                sys.audit("selsft.write", os.fspath(path))
            return original(*args, **kwargs)

        setattr(owner, name, told)

    wrap(pa, "OSFile", lambda path, mode="r", *_, **__: path if "w" in mode else None)
    wrap(pq.ParquetWriter, "__init__", lambda _, where, *__, **___: where)
    wrap(safetensors.torch, "serialize_file", lambda _, path, *__, **___: path)
    wrap(torch, "save", lambda _, path, *__, **___: path)
    wrap(transformers.PreTrainedTokenizerFast, "save_pretrained", lambda _, folder, *__, **___: folder)
