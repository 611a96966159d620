"""A folder of scores: Parquet shards of consecutive rows and a manifest that says what made them.

`selsft score` writes one for training to read, and the trainer keeps its own scores in such folders. A shard appears
by a rename when it is complete, so what exists is finished, whatever killed the process. Shards carry
hashes of their rows, of their scores and of the identity (all that decides a score besides the rows), and are reused
only where all three match. Nothing in a shard depends on time or on the process that wrote it: a resumed run ends
with the same bytes as an uninterrupted one. Rejected: one Arrow data set written at the end, which loses hours to an
interrupt, and a list of finished shards in the manifest while they are computed, which several processes would have to
lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset

from ..errors import InputError, check_type
from ..records import file_sha256, json_sha256, replaced, unsealed, write_sealed
from .chunks import TokenChunk, chunk_sha256

logger = logging.getLogger(__name__)

MANIFEST = "selsft_scores.json"
FORMAT = 3
_SHARD = re.compile(r"shard-(\d{5,})\.parquet")
_ROWS = ("input_ids", "labels")
_REMEDY = "resume with the former settings, choose another scored_dir, or compute everything again with --rescore true"


class ScoredFolder:
    """
    Args:
        path: the folder.
        identity: all that decides a score besides the rows, JSON values: hashes, dtypes, settings that change tokens.
    """

    def __init__(self, path: str | Path, identity: dict[str, Any]):
        self.path, self.identity = Path(path), identity
        self._identity_sha256 = json_sha256(identity)

    def open(self, facts: dict[str, Any], rescore: bool = False) -> None:
        """Create the folder, or continue the one that is there. For one process; the others call `check`.

        Args:
            facts: goes into a new manifest beside the identity (names, versions).
            rescore: remove what was made by something else.

        Raises:
            `ValueError` when the folder was made by something else, naming what differs.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if rescore:
            (self.path / MANIFEST).unlink(missing_ok=True)
            for shard in self._shards().values():
                shard.unlink()
        if (self.path / MANIFEST).exists():
            self.check()
            versions, before = facts.get("versions"), read_manifest(self.path).get("versions")
            if versions != before:
                logger.warning(f"{self.path} was begun with the versions {before}, this run has {versions}")
        else:
            self._write({"format": FORMAT, "finished": False, **facts, "identity": self.identity})

    def check(self) -> None:
        """Raise `ValueError` when the folder was made by something else than this run."""
        if changed := differences(read_manifest(self.path)["identity"], self.identity):
            raise ValueError(f"scored_dir={str(self.path)!r} was made with {'; '.join(changed)}: {_REMEDY}")

    def finished(self, index: int, chunk: TokenChunk) -> bool:
        """Whether shard `index` is there and was made from the rows of `chunk`.

        Raises:
            `ValueError` when it was made from other rows, or by another run.
        """
        path = self.path / _name(index)
        try:
            info = _metadata(path)
            identity, data = info["identity_sha256"], info["data_sha256"]
        except FileNotFoundError:
            return False
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            logger.warning(f"{path} cannot be read ({error}): it is computed again.")
            return False
        if identity != self._identity_sha256:
            raise ValueError(f"{path} was made by another run than the other shards: {_REMEDY}")
        if data != chunk_sha256(chunk):
            last = chunk.first_row + len(chunk.lengths) - 1
            raise ValueError(
                f"the data has changed: {path} was made from other rows than the rows {chunk.first_row} to {last} of "
                f"this run (or from the same, tokenised in another way): {_REMEDY}"
            )
        return True

    def write(self, index: int, chunk: TokenChunk, scores: Mapping[str, np.ndarray]) -> None:
        """Write shard `index`: the rows of `chunk` and flat `(tokens,)` float columns."""
        offsets = pa.array(np.concatenate([[0], np.cumsum(chunk.lengths)]).astype(np.int32))
        flat = {name: pa.array(np.asarray(chunk.columns[name]), type=pa.int32(), safe=True) for name in _ROWS}
        flat |= {name: pa.array(values, type=pa.float32()) for name, values in scores.items()}
        info = {
            "index": index,
            "first_row": chunk.first_row,
            "rows": len(chunk.lengths),
            "tokens": chunk.size,
            "data_sha256": chunk_sha256(chunk),
            "scores_sha256": _scores_sha256(scores),
            "identity_sha256": self._identity_sha256,
        }
        metadata = {"selsft": json.dumps(info)}
        if tokenizer := self.identity.get("tokenizer_sha256"):
            metadata["tokenizer_sha256"] = tokenizer
        columns = {name: pa.ListArray.from_arrays(offsets, values) for name, values in flat.items()}
        with replaced(self.path / _name(index)) as handle:
            table = pa.table(columns).replace_schema_metadata(metadata)
            pq.write_table(table, handle, compression="zstd", write_page_checksum=True)

    def read(self, index: int) -> dict[str, np.ndarray]:
        """The scores of a shard that is there: column -> flat `(tokens,)` float32.

        Raises:
            `ValueError` for a shard whose content is not what was written.
        """
        return _read(self.path / _name(index))

    def missing(self, count: int) -> list[int]:
        """Which of the shards `0 ... count - 1` are not there."""
        there = self._shards()
        return [index for index in range(count) if index not in there]

    def finish(self, count: int, idle: float = 0.0, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Write the manifest of a whole folder of `count` shards, and return it.

        Args:
            facts: goes into the manifest, replacing what it had under these names.
            idle: half-written files of a killed process are removed when they are this many seconds old; another run
                may be at work in a shared folder.

        Raises:
            `ValueError` when there are more shards, since then the data has fewer rows than before, and for a shard
            that is damaged.
        """
        there = self._shards()
        if extra := sorted(set(there) - set(range(count))):
            raise ValueError(
                f"the data has changed: it ends before {there[extra[0]]}, which was made from more rows: {_REMEDY}"
            )
        shards, row = [], 0
        whole = hashlib.sha256()
        for index in range(count):
            info = _metadata(there[index])
            assert info["first_row"] == row and info["identity_sha256"] == self._identity_sha256
            _read(there[index])  # it may come from an earlier run
            shards.append({
                "file": there[index].name, "first_row": row, "rows": info["rows"], "tokens": info["tokens"],
                "bytes": there[index].stat().st_size, "sha256": file_sha256(there[index]),
            })  # fmt: skip
            whole.update(bytes.fromhex(info["data_sha256"]))
            row += info["rows"]
        manifest = {**read_manifest(self.path), **(facts or {})} | {
            "finished": True,
            "rows": row,
            "tokens": sum(shard["tokens"] for shard in shards),
            "data_sha256": whole.hexdigest(),
            "shards": shards,
        }
        self._write(manifest)
        for name in (".shard-*.parquet.*", f".{MANIFEST}.*"):
            for leftover in self.path.glob(name):
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - leftover.stat().st_mtime >= idle:
                        leftover.unlink()
        return manifest

    def _shards(self) -> dict[int, Path]:
        matches = ((_SHARD.fullmatch(path.name), path) for path in self.path.iterdir())
        return {int(match[1]): path for match, path in matches if match}

    def _write(self, manifest: dict[str, Any]) -> None:
        write_sealed(self.path / MANIFEST, manifest)


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two identities, in words. Weights of another dtype also have another hash: one change."""
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    for side in ("", "reference_"):
        digest = "reference_sha256" if side else "model_sha256"
        if f"{side}dtype" in changed and digest in changed:
            changed.remove(digest)
    lines = []
    for name in changed:
        old, new = before.get(name), now.get(name)
        if name.endswith("_sha256"):
            old, new = (str(value)[:12] for value in (old, new))
            lines.append(f"another {name.removesuffix('_sha256')} (sha256 {old}, now {new})")
        else:
            lines.append(f"{name}={old!r}, this run has {name}={new!r}")
    return lines


def is_scored(path: str | Path) -> bool:
    """Whether `path` is a folder that `selsft score` has begun."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a folder of scores.

    Raises:
        `InputError` when it is damaged, or of a version of selsft that wrote another format.
    """
    file = Path(path) / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        found = manifest.get("format")
        content = unsealed(manifest) if found == FORMAT else {}
    except (ValueError, AttributeError) as error:
        raise InputError(f"{str(file)!r} is damaged ({error}): score the data again with --rescore true") from error
    if found != FORMAT:
        raise InputError(
            f"scored_dir={str(path)!r} has the format {found}, this version of selsft reads and writes {FORMAT}: "
            "choose another scored_dir and score the data again"
        )
    return content


def load_scores(path: str | Path) -> Dataset:
    """The rows of a finished folder, mapped into memory: `input_ids`, `labels`, `base_logps`, `ref_logps`.

    Raises:
        `InputError` for a folder without scores or one that is not finished, and for a shard that is missing, damaged
            or of another run.
    """
    check_type("path", path, (str, Path), "the folder of `selsft score`")
    if not is_scored(path):
        raise InputError(f"{str(path)!r} holds no scores: give a folder that `selsft score` has written")
    path = Path(path)
    manifest = read_manifest(path)
    if not manifest["finished"]:
        there = len([name for name in path.iterdir() if _SHARD.fullmatch(name.name)])
        raise InputError(
            f"{str(path)!r} holds scores that are not finished ({there} shards so far): run the same `selsft score` "
            "command again, which resumes where it stopped"
        )
    identity = json_sha256(manifest["identity"])
    for shard in manifest["shards"]:
        file = path / shard["file"]
        if not file.is_file() or file_sha256(file) != shard["sha256"]:
            raise _damaged(file, "is damaged" if file.is_file() else "is missing")
        if _metadata(file)["identity_sha256"] != identity:
            raise _damaged(file, "was made by another run than the manifest")
    files = [str(path / shard["file"]) for shard in manifest["shards"]]
    return load_dataset("parquet", data_files=files, split="train")


def _name(index: int) -> str:
    return f"shard-{index:05d}.parquet"


def _metadata(path: Path) -> dict[str, Any]:
    return json.loads((pq.read_schema(path).metadata or {})[b"selsft"])


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        names = [name for name in table.column_names if name not in _ROWS]
        scores = {name: table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False) for name in names}
        wanted = _metadata(path)["scores_sha256"]
    except (pa.ArrowException, OSError, KeyError) as error:
        raise _damaged(path, f"is damaged ({str(error).splitlines()[0]})") from error
    if _scores_sha256(scores) != wanted:
        raise _damaged(path, "is damaged (the scores are not those that were written)")
    return scores


def _scores_sha256(scores: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, values in sorted(scores.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(values, np.float32).data)
    return digest.hexdigest()


def _damaged(path: Path, state: str) -> InputError:
    return InputError(
        f"{str(path)!r} {state}: remove it and run the same `selsft score` command again, which computes this shard "
        "alone"
    )
