"""Log-probabilities from an inference server, for `selsft score --ref_logps` and `--base_logps`.

    selsft tokens --config recipe.yaml --tokens_dir runs/tokens
    vllm serve my-org/big-reference
    python docs/examples/vllm_scores.py runs/tokens runs/served \\
        --server http://localhost:8000 --model my-org/big-reference
    selsft score --config recipe.yaml --ref_logps runs/served --scored_dir runs/scored

Sends token ids, never text, to `/v1/completions` with `prompt_logprobs`, or with `--engine offline` to vLLM's `LLM` in
this process. Writes a file for each one of the tokens folder, when it is complete, so a stopped run resumes where it
was. What the server says must be about the very ids that were sent. Needs numpy and pyarrow only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Score = Callable[[list[list[int]]], Iterator[list]]


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    parts = sorted(arguments.tokens.glob("part-*.parquet"))
    if not parts:
        sys.exit(f"{arguments.tokens} has no part-*.parquet: make it with `selsft tokens --tokens_dir`")
    if arguments.engine == "server" and not arguments.server:
        sys.exit("--server is missing: give --server http://HOST:PORT, or --engine offline")
    arguments.output.mkdir(parents=True, exist_ok=True)
    score: Score | None = None
    for part in parts:
        table, path = pq.read_table(part), arguments.output / part.name
        if path.exists():
            if pq.read_table(path, columns=["input_ids"])["input_ids"] != table["input_ids"]:
                sys.exit(f"{path} is about other tokens than {part}: choose another output folder")
            continue
        if score is None:
            score = offline(arguments) if arguments.engine == "offline" else server(arguments)
        start = time.perf_counter()
        rows = table["input_ids"].to_pylist()
        answers = enumerate(zip(rows, score(rows), strict=True))
        logps = [logps_of(ids, said, f"row {row} of {part}") for row, (ids, said) in answers]
        write(path, table, logps, arguments.model)
        tokens = sum(map(len, rows))
        print(f"{path}: {len(rows):,} rows, {tokens:,} tokens, {tokens / (time.perf_counter() - start):,.0f} a second")
    return 0


def logps_of(ids: list[int], said: list, where: str) -> np.ndarray:
    """Log-probability of each token given those before it, nats; NaN for the first, which nothing predicts.

    Args:
        said: for each position `None` (the first) or a mapping of ids to `{"logprob": x}`, as vLLM returns it; the id
            itself is always among them.
    """
    if said is None:
        sys.exit(f"{where}: the server returned no prompt_logprobs: it must be vLLM or speak its protocol")
    if len(said) != len(ids):
        sys.exit(f"{where} has {len(ids)} tokens, the server scored {len(said)}: check its context length")
    found = np.full(len(ids), np.nan, np.float32)
    for place in range(1, len(ids)):
        entry = (said[place] or {}).get(str(ids[place]))
        if entry is None:
            sys.exit(f"{where}: the server scored another token than {ids[place]} at position {place}: other ids")
        found[place] = min(entry["logprob"], 0.0)  # rounding may put a certain token above 0
    return found


def write(path: Path, table: pa.Table, logps: list[np.ndarray], model: str) -> None:
    """The rows with `logps`, under a name that exists only when the file is complete."""
    values = pa.array(logps, pa.list_(pa.float32()))
    found = table.select(["input_ids", "labels"]).append_column("logps", values)
    found = found.replace_schema_metadata({**(table.schema.metadata or {}), "scored_by": model})
    temporary = path.with_name(f".{path.name}.part")
    pq.write_table(found, temporary)
    os.replace(temporary, path)


# The server


def server(arguments: argparse.Namespace) -> Score:
    """Rows in requests of `--rows`, several at a time, answers in the order of the rows."""
    url = arguments.server.rstrip("/") + "/v1/completions"
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("VLLM_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"

    def ask(rows: list[list[int]]) -> list[list]:
        body = {"model": arguments.model, "prompt": rows, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        for attempt in range(arguments.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=arguments.timeout) as answer:
                    choices = json.load(answer)["choices"]
                if len(choices) != len(rows):
                    sys.exit(f"{url} answered {len(choices)} of {len(rows)} prompts")
                return [each.get("prompt_logprobs") for each in sorted(choices, key=lambda each: each["index"])]
            except urllib.error.HTTPError as error:
                if error.code not in (429, 500, 502, 503, 504) or attempt == arguments.retries:
                    sys.exit(f"{url}: {error.code} {error.read().decode(errors='replace')[:500]}")
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                if attempt == arguments.retries:
                    sys.exit(f"{url}: {error}. What is finished is kept, the same command resumes")
            time.sleep(min(2**attempt, 30))
        raise AssertionError

    def score(rows: list[list[int]]) -> Iterator[list]:
        batches = [rows[start : start + arguments.rows] for start in range(0, len(rows), arguments.rows)]
        with ThreadPoolExecutor(arguments.connections) as pool:
            for found in pool.map(ask, batches):
                yield from found

    return score


# vLLM in this process


def offline(arguments: argparse.Namespace) -> Score:
    """vLLM's own engine. Written against its documentation; not run in the tests, which have no vLLM."""
    from vllm import LLM, SamplingParams

    engine = LLM(model=arguments.model)
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)

    def score(rows: list[list[int]]) -> Iterator[list]:
        for found in engine.generate([{"prompt_token_ids": ids} for ids in rows], sampling):
            yield [
                each and {str(token): {"logprob": entry.logprob} for token, entry in each.items()}
                for each in found.prompt_logprobs
            ]

    return score


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("tokens", type=Path, help="folder of `selsft tokens`")
    add("output", type=Path, help="folder for the log-probabilities; what is there is not computed again")
    add("--engine", choices=("server", "offline"), default="server")
    add("--server", help="such as http://localhost:8000; VLLM_API_KEY in the environment is sent along")
    add("--model", required=True, help="what the server calls the model; a name or folder for the offline engine")
    add("--rows", type=int, default=16, help="rows of a request (default: 16)")
    add("--connections", type=int, default=8, help="requests at a time (default: 8)")
    add("--timeout", type=float, default=600.0, help="seconds to wait for an answer (default: 600)")
    add("--retries", type=int, default=5, help="of a request that fails (default: 5)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
