"""A folder of scores: Parquet shards of consecutive rows and a manifest that says what made them.

A shard appears by a rename when it is whole, so what exists is finished, whatever killed the process that was at
work. Shards carry a hash of their rows and of the settings, and are taken over only where both still hold. Nothing in
a shard depends on time or on the process that wrote it: a resumed run ends in the same bytes as an uninterrupted one.
Rejected: one Arrow data set written at the end, which loses hours to an interrupt, and a list of finished shards in
the manifest while they are made, which several processes would have to lock.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset

from ..records import file_sha256, json_sha256, replaced, write_json
from .chunks import TokenChunk
from .columns import BASE_LOGPS, REF_LOGPS

logger = logging.getLogger(__name__)

MANIFEST = "selsft_scores.json"
FORMAT = 2
_SHARD = re.compile(r"shard-(\d{5,})\.parquet")
_TYPES = {"input_ids": pa.int32(), "labels": pa.int32(), BASE_LOGPS: pa.float32(), REF_LOGPS: pa.float32()}
_REMEDY = "go on with the former settings, choose another scored_dir, or compute everything anew with --rescore true"


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
        """Create the folder, or take up the one that is there. For one process; the others call `check`.

        Args:
            facts: goes into a new manifest beside the identity (names, versions).
            rescore: remove what was made by something else.

        Raises:
            `ValueError` when the folder was made by something else, naming what differs.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for name in (".shard-*.parquet.*", f".{MANIFEST}.*"):
            for leftover in self.path.glob(name):  # of a process that was killed
                leftover.unlink(missing_ok=True)
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
        before = read_manifest(self.path)
        if before.get("format") != FORMAT:
            raise ValueError(
                f"scored_dir={str(self.path)!r} has the format {before.get('format')}, this version of selsft writes "
                f"{FORMAT}: choose another scored_dir"
            )
        changed = differences(before["identity"], self.identity)
        if changed:
            raise ValueError(f"scored_dir={str(self.path)!r} was made with {'; '.join(changed)}: {_REMEDY}")

    def finished(self, index: int, chunk: TokenChunk) -> bool:
        """Whether shard `index` is there and was made from the rows of `chunk`.

        Raises:
            `ValueError` when it was made from other rows.
        """
        path = self.path / _name(index)
        try:
            found = _metadata(path)
        except FileNotFoundError:
            return False
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            logger.warning(f"{path} cannot be read ({error}): it is computed again.")
            return False
        if found["identity_sha256"] != self._identity_sha256:
            raise ValueError(f"{path} was made by another run than the other shards: {_REMEDY}")
        if found["data_sha256"] != chunk_sha256(chunk):
            last = chunk.first_row + len(chunk.lengths) - 1
            raise ValueError(
                f"the data has changed: {path} was made from other rows than the rows {chunk.first_row} to {last} of "
                f"this run (or from the same, tokenised in another way): {_REMEDY}"
            )
        return True

    def write(self, index: int, chunk: TokenChunk, base: np.ndarray, ref: np.ndarray) -> None:
        """Write shard `index`: the rows of `chunk` and flat `(tokens,)` log-probabilities."""
        offsets = pa.array(np.concatenate([[0], np.cumsum(chunk.lengths)]).astype(np.int32))
        flat = {**chunk.columns, BASE_LOGPS: base, REF_LOGPS: ref}
        columns = {
            name: pa.ListArray.from_arrays(offsets, pa.array(np.asarray(flat[name]), type=kind, safe=True))
            for name, kind in _TYPES.items()
        }
        info = {
            "index": index,
            "first_row": chunk.first_row,
            "rows": len(chunk.lengths),
            "tokens": chunk.size,
            "data_sha256": chunk_sha256(chunk),
            "identity_sha256": self._identity_sha256,
        }
        metadata = {"selsft": json.dumps(info)}
        if tokenizer := self.identity.get("tokenizer_sha256"):
            metadata["tokenizer_sha256"] = tokenizer
        with replaced(self.path / _name(index)) as handle:
            table = pa.table(columns).replace_schema_metadata(metadata)
            pq.write_table(table, handle, compression="zstd", write_page_checksum=True)

    def missing(self, count: int) -> list[int]:
        """Which of the shards `0 ... count - 1` are not there."""
        there = self._shards()
        return [index for index in range(count) if index not in there]

    def finish(self, count: int) -> dict[str, Any]:
        """Write the manifest of a whole folder of `count` shards, and return it.

        Raises:
            `ValueError` when there are more shards, since then the data has fewer rows than before.
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
            _verify(there[index])
            shards.append({
                "file": there[index].name, "first_row": row, "rows": info["rows"], "tokens": info["tokens"],
                "bytes": there[index].stat().st_size, "sha256": file_sha256(there[index]),
            })  # fmt: skip
            whole.update(bytes.fromhex(info["data_sha256"]))
            row += info["rows"]
        manifest = read_manifest(self.path) | {
            "finished": True,
            "rows": row,
            "tokens": sum(shard["tokens"] for shard in shards),
            "data_sha256": whole.hexdigest(),
            "shards": shards,
        }
        self._write(manifest)
        return manifest

    def _shards(self) -> dict[int, Path]:
        found = ((_SHARD.fullmatch(path.name), path) for path in self.path.iterdir())
        return {int(match[1]): path for match, path in found if match}

    def _write(self, manifest: dict[str, Any]) -> None:
        write_json(self.path / MANIFEST, manifest)


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two identities, in words. Weights of another dtype also have another hash: one change."""
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    for side in ("", "reference_"):
        digest = "reference_sha256" if side else "model_sha256"
        if f"{side}dtype" in changed and digest in changed:
            changed.remove(digest)
    found = []
    for name in changed:
        old, new = before.get(name), now.get(name)
        if name.endswith("_sha256"):
            old, new = (str(value)[:12] for value in (old, new))
            found.append(f"another {name.removesuffix('_sha256')} (sha256 {old}, now {new})")
        else:
            found.append(f"{name}={old!r}, this run has {name}={new!r}")
    return found


def is_scored(path: str | Path) -> bool:
    """Whether `path` is a folder that `selsft score` has begun."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a folder of scores."""
    return json.loads((Path(path) / MANIFEST).read_text())


def load_scored(path: str | Path) -> Dataset:
    """The rows of a finished folder, mapped into memory: `input_ids`, `labels`, `base_logps`, `ref_logps`.

    Raises:
        `ValueError` for a folder that is not finished, and for a shard that is missing or damaged.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if not manifest["finished"]:
        there = len([name for name in path.iterdir() if _SHARD.fullmatch(name.name)])
        raise ValueError(
            f"{str(path)!r} holds scores that are not finished ({there} shards so far): run the same `selsft score` "
            "command again, which goes on where it stopped"
        )
    for shard in manifest["shards"]:
        file = path / shard["file"]
        if not file.is_file() or file_sha256(file) != shard["sha256"]:
            state = "is damaged" if file.is_file() else "is missing"
            raise ValueError(
                f"{str(file)!r} {state}: remove it and run the same `selsft score` command again, which computes this "
                "shard alone"
            )
    files = [str(path / shard["file"]) for shard in manifest["shards"]]
    return load_dataset("parquet", data_files=files, split="train")


def chunk_sha256(chunk: TokenChunk) -> str:
    """Hash of the lengths, token ids and labels of consecutive rows."""
    digest = hashlib.sha256(np.asarray(chunk.lengths, np.int64).tobytes())
    for name in ("input_ids", "labels"):
        digest.update(np.ascontiguousarray(chunk.columns[name], np.int64).data)
    return digest.hexdigest()


def _name(index: int) -> str:
    return f"shard-{index:05d}.parquet"


def _metadata(path: Path) -> dict[str, Any]:
    return json.loads(pq.read_schema(path).metadata[b"selsft"])


def _verify(path: Path) -> None:
    """Read the shard with its checksums; it may come from an earlier run."""
    try:
        pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged ({str(error).splitlines()[0]}): remove it and run the same `selsft score` "
            "command again, which computes this shard alone"
        ) from error
