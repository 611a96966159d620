"""What an evaluation has finished, kept batch by batch, so that the same command resumes where it was cut off.

A line for each batch, appended to a file that is named after all that decides the values: other weights, rows or
settings have another file. A line carries a hash of itself, so that one that was cut off, and whatever follows it, is
computed again. Rejected: a file for each batch, of which there may be a hundred thousand.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import tqdm

from ..records import json_sha256

T = TypeVar("T")
FOLDER = ".unfinished"


class Kept:
    """
    Args:
        folder: where to keep things; nowhere when `None`.
        identity: all that decides the values besides the inputs of a measure: model, precision, sizes. JSON values.
    """

    def __init__(self, folder: Path | None = None, identity: Any = None):
        self.folder, self.identity = folder, identity
        self.progress: Callable[[int], object] = lambda count: None  # moves the bar within a batch

    def each(
        self,
        name: str,
        title: str,
        inputs: Any,
        batches: Sequence[T],
        work: Callable[[T], Any],
        sizes: Sequence[int] | None = None,
    ) -> Iterator[Any]:
        """`work(batch)` for each batch, in order, read where it is there already.

        Args:
            name: of the measure.
            title: of the progress bar.
            inputs: what the batches are made of, JSON values.
            work: returns JSON values; may tell `progress` how far it is.
            sizes: of each batch on the progress bar, 1 by default.
        """
        sizes = sizes or [1] * len(batches)
        quiet = bool(os.environ.get("TQDM_DISABLE"))
        file = self._file(name, inputs)
        there = [] if file is None else _read(file)
        with (
            nullcontext() if file is None else file.open("ab") as handle,
            tqdm(total=sum(sizes), desc=title, disable=quiet) as bar,
        ):
            end, self.progress = 0, bar.update
            for index, batch in enumerate(batches):
                found = there[index] if index < len(there) else work(batch)
                if handle is not None and index >= len(there):
                    handle.write(_line(found))
                    handle.flush()
                end += sizes[index]
                bar.update(end - bar.n)
                yield found

    def rows(
        self,
        name: str,
        title: str,
        inputs: Sequence[Any],
        batches: Sequence[Any],
        work: Callable[[Any], list[Any]],
        sizes: Sequence[int] | None = None,
    ) -> list[Any]:
        """A value for each of `inputs`, in their order; `work` gives those of a batch of indices."""
        found: list[Any] = [None] * len(inputs)
        values = self.each(name, title, inputs, batches, work, sizes)
        for indices, batch in zip(batches, values, strict=True):
            for index, value in zip(indices, batch, strict=True):
                found[index] = value
        return found

    def one(self, name: str, title: str, inputs: Any, work: Callable[[], T]) -> T:
        """`work()`, a JSON value, read where it is there already."""
        (found,) = self.each(name, title, inputs, [None], lambda _: work())
        return found

    def _file(self, name: str, inputs: Any) -> Path | None:
        if self.folder is None:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{name}-{json_sha256([self.identity, inputs])[:16]}.jsonl"


def _line(value: Any) -> bytes:
    text = json.dumps(value).encode()
    return hashlib.sha256(text).hexdigest()[:16].encode() + b" " + text + b"\n"


def _read(path: Path) -> list[Any]:
    """The values of all lines before the first that is not whole, which is cut off with what follows it."""
    found: list[Any] = []
    size = 0
    if not path.exists():
        return found
    with path.open("r+b") as file:
        for line in file.readlines():
            digest, _, text = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or hashlib.sha256(text).hexdigest()[:16].encode() != digest:
                file.truncate(size)
                break
            found.append(json.loads(text))
            size += len(line)
    return found
