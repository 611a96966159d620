"""What `selsft score` does besides forward passes: rows that are read and cut, shards that are written, bytes on disk.

    python benchmarks/scoring_io.py [--tokens 4000000] [--folder SCORED]

These bound how many workers one command can feed and write for (`--engine ray`), and what a data set costs on disk.
Scores are standard normal noise: float32 that compresses as little as real scores do. With `--folder`, the bytes per
token of a folder that `selsft score` has written.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from datasets import Dataset, Sequence, Value

from selsft.data.chunks import token_chunks
from selsft.data.scored_folder import ScoredFolder, read_manifest

parser = argparse.ArgumentParser()
parser.add_argument("--tokens", type=int, default=4_000_000)
parser.add_argument("--folder", help="a scored folder, to count its bytes per token")
options = parser.parse_args()


def rows(tokens: int, folder: Path) -> Dataset:
    """Rows of log-normal length, ids by Zipf's law, the first half unlabelled, mapped from the disk."""
    rng = np.random.default_rng(0)

    def generate():
        left = tokens
        while left > 0:
            size = int(np.clip(rng.lognormal(5.5, 0.8), 16, 2048))
            ids = np.minimum(rng.zipf(1.2, size), 49_151).astype(np.int32)
            labels = np.where(np.arange(size) < size // 2, -100, ids).astype(np.int32)
            yield {"input_ids": ids, "labels": labels}
            left -= size

    kind = Sequence(Value("int32"))
    made = Dataset.from_generator(generate, cache_dir=str(folder), features=None)
    return made.cast_column("input_ids", kind).cast_column("labels", kind)


def seconds(work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


if options.folder:
    manifest = read_manifest(options.folder)
    size = sum(shard["bytes"] for shard in manifest["shards"])
    print(f"{options.folder}: {manifest['tokens']:,} tokens, {size / manifest['tokens']:.2f} bytes each")
else:
    with tempfile.TemporaryDirectory() as name:
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
        data = rows(options.tokens, Path(name) / "rows")
        names = ("input_ids", "labels")
        total = sum(chunk.size for chunk in token_chunks(data, names))
        read = [seconds(lambda: [chunk.size for chunk in token_chunks(data, names, documents=True)]) for _ in range(3)]
        store = ScoredFolder(Path(name) / "scored", {"model_sha256": "0"})
        store.open({})
        rng = np.random.default_rng(1)
        chunks = [(chunk, {n: rng.normal(size=chunk.size).astype(np.float32) for n in ("base_logps", "ref_logps")})
                  for chunk in token_chunks(data, names, documents=True)]  # fmt: skip
        for chunk, scores in chunks:  # scores are 0 where nothing is supervised
            for values in scores.values():
                values[chunk.columns["labels"] == -100] = 0.0
        write = [
            seconds(lambda: [store.write(i, chunk, scores) for i, (chunk, scores) in enumerate(chunks)])
            for _ in range(3)
        ]
        manifest = store.finish(len(chunks))
        size = sum(shard["bytes"] for shard in manifest["shards"])
        for what, times in (("read and cut", read), ("hash, compress and write", write)):
            print(f"{what}: {total / np.median(times) / 1e6:.1f} million tokens per processor second "
                  f"[{total / max(times) / 1e6:.1f}, {total / min(times) / 1e6:.1f}]")  # fmt: skip
        print(f"on disk: {size / total:.2f} bytes per token")
