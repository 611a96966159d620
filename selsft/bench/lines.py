"""Result files: JSON lines, one measurement each, written the moment it is made.

A file is only ever appended to, so a process that is killed loses what it was measuring and nothing else, and
measurements of several runs and machines add up. Whoever reads it takes the last line of each measurement. Imports
nothing but the standard library: a process that survives the failures of others reads and writes them too. Rejected: a
table written at the end of a run.
"""

import json
import os
from pathlib import Path
from typing import Any


def append(path: Path, line: dict[str, Any]) -> None:
    """Adds a line to a file and waits until it is on the disk.

    One write, so that lines of two processes do not mix. What a killed process left of a line ends where this begins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        cut = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write(b"\n" * cut + json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of a file, in their order, of one kind if it is given; none if there is no file."""
    found = []
    for text in path.read_bytes().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:  # cut off by a kill
            continue
        if kind in (None, line.get("kind")):
            found.append(line)
    return found
