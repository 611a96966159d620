"""Records of what was done: files that are complete or absent, locks, hashes, versions.

Every file that selsft writes besides weights goes through here. A file gets its name when it is complete and synced to
the disk, so what exists is finished, whatever killed the process that wrote it. Rejected: one writer for each command,
of which some would sync and some not.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .errors import InputError, failed_write, first_line
from .secrets import redact

PACKAGES = ("selsft", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "triton")
RUN = "selsft_run.json"  # what made a folder of weights, scores or figures
MAKE_ROOM = "Make room on the disk, or let files be written there"
_PART = ".part"
_SEAL = "content_sha256"
logger = logging.getLogger(__name__)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which gets its name only when it is complete and on the disk; until then nothing has it."""
    handle = tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=_PART, delete=False)
    try:
        with handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(handle.name, 0o666 & ~_umask())  # a temporary file is readable for its owner only
        os.replace(handle.name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(handle.name)
        raise


@contextlib.contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `path` when it is complete. Leftovers of a killed process go."""
    part = path.with_name(f".{path.name}.part")
    remove(part)
    part.mkdir(parents=True)
    try:
        yield part
        remove(path)
        os.replace(part, path)
    except BaseException:
        remove(part)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_json(path: Path, record: object) -> None:
    """Write a JSON file that is never seen half-written and has no secrets in it (`secrets.redact`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as handle:
        handle.write((json.dumps(redact(record), indent=2, ensure_ascii=False, default=str) + "\n").encode())


def write_sealed(path: Path, record: dict[str, Any]) -> None:
    """`write_json` of an object, with a hash of its content in it, for `unsealed`."""
    content = json.loads(json.dumps(redact(record), default=str))  # as it will be read
    write_json(path, {**content, _SEAL: json_sha256(content)})


def unsealed(content: dict[str, Any]) -> dict[str, Any]:
    """The object that `write_sealed` was given.

    Raises:
        `ValueError` when something in it has changed since.
    """
    record = {name: value for name, value in content.items() if name != _SEAL}
    if content.get(_SEAL) != json_sha256(record):
        raise ValueError("its content is not what was written")
    return record


def read_sealed(path: Path, remedy: str) -> dict[str, Any]:
    """What `write_sealed` wrote; empty when the file is missing.

    Raises:
        `InputError` naming the file when it is damaged.
    """
    try:
        return unsealed(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError) as error:  # no JSON, other content, no object
        raise InputError(f"{str(path)!r} is damaged ({first_line(error)}): {remedy}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when the file is missing or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, FileNotFoundError):
        return {}
    return content if isinstance(content, dict) else {}


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Take away what a killed process has left half-written in a folder that is held by this one."""
    for leftover in folder.glob(f".*{_PART}"):
        remove(leftover)


def make_writable(folder: Path, field: str) -> None:
    """Create a folder. Raises `InputError` naming `field` when that, or writing into it, is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{field}={str(folder)!r} cannot be created ({error.strerror}): choose another folder"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{field}={str(folder)!r} cannot be written to: choose another folder, or change its mode")


@contextlib.contextmanager
def exclusive(folder: Path, field: str = "output_dir") -> Iterator[None]:
    """Hold `folder`, which is created, against other processes, until this one ends, however it ends.

    The lock is on the folder itself and leaves no file in it. What a killed process has left half-written there goes.

    Raises:
        `InputError` naming `field` when another process holds it, and when it cannot be written to.
    """
    created = not folder.exists()
    make_writable(folder, field)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InputError(
            f"{field}={str(folder)!r}: another process is at work in it. Wait for it, or choose another folder"
        ) from None
    except OSError as error:  # some network file systems cannot lock a folder
        logger.warning(f"{folder} cannot be locked ({error}): do not run two commands in it at once")
    else:
        sweep(folder)
    try:
        yield
    finally:
        os.close(handle)
        if created:
            with contextlib.suppress(OSError):
                folder.rmdir()  # if nothing was written


@contextlib.contextmanager
def resumable(folder: Path, field: str, kept: str) -> Iterator[None]:
    """While a command works in `folder`: whatever cuts it off ends in one line that says what is kept.

    Args:
        kept: what is kept and how to resume, as the end of that line.

    Raises:
        `InputError` naming `field` and the folder when a file cannot be written, `KeyboardInterrupt` with the line.
    """
    try:
        yield
    except InputError:
        raise
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(str(error) or f"{folder}: {kept}") from None
    except Exception as error:
        if (what := failed_write(error)) is None:
            raise
        raise InputError(f"{field}={str(folder)!r}: {what}. {MAKE_ROOM}: {kept}") from error


def json_sha256(content: object) -> str:
    """Hash of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Hash of the content of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # triton exists on Linux only
            found[name] = importlib.metadata.version(name)
    return found


def now() -> str:
    """The time as records have it: UTC, ISO 8601, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
