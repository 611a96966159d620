"""`selsft score --engine ray`: the models of a scoring run on the workers of a Ray cluster.

The command reads the rows, writes the shards and keeps the manifest, as ever; only the forward passes are elsewhere.
One task reads the rows and yields a block for each missing shard, actors that hold the models turn blocks into scores,
and these come back in order. Ray Data holds reading back when the actors are busy, starts an actor anew when its
process or machine is lost, and gives it the block again. A worker is made by the code that makes a run in one process
and must agree with the command on the hashes of weights, tokenizer and settings; so the folder is the same, byte for
byte where the hardware and the number of threads are. Rejected: workers that write shards, which need storage that all
machines see; an own pool over Ray's actors, which would be a scheduler of ours to maintain.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import pyarrow as pa
from datasets import Dataset

from .data.chunks import TokenChunk, token_chunks
from .data.scored_folder import differences
from .errors import InputError
from .score import Columns, ScoringRun
from .scoring.logprobs import ROW_COLUMNS

Make = Callable[[Dataset], ScoringRun]
_FIRST, _LENGTHS = "first_row", "lengths"


def connect() -> Any:
    """The module `ray`, connected: to the cluster of `RAY_ADDRESS`, else to one that starts on this machine.

    Raises:
        `InputError` when Ray is not installed, or the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError(f"engine='ray' needs Ray ({error}): pip install 'selsft[ray]'") from error
    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as error:
            address = os.environ.get("RAY_ADDRESS")
            raise InputError(f"RAY_ADDRESS={address!r}: no Ray cluster answers there ({error})") from error
    return ray


@contextlib.contextmanager
def ray_columns(run: ScoringRun, missing: Sequence[int], *, make: Make, workers: int | None) -> Iterator[Columns]:
    """The engine of `ScoringRun.score` on a Ray cluster.

    Args:
        make: makes a worker's run from one prepared row, which stands for the data.
        workers: how many; by default one for each GPU of the cluster, without GPUs one for each node.

    Raises:
        `InputError` for streamed rows, for more workers than the cluster has room for, and for a worker whose models
        are not those of this run.
    """
    rows = run.trainer.train_dataset
    if not isinstance(rows, Dataset):
        raise InputError("engine='ray' with streamed rows: set dataset_streaming=False, or leave engine out")
    if run.models.sharded:
        raise InputError("engine='ray' with sharded weights: a Ray worker holds a whole model; leave engine out")
    if not missing:
        yield _nothing
        return
    ray = connect()
    count, each = _room(ray, workers, run.args.use_cpu)
    _leave_accelerator(run)
    names = ROW_COLUMNS
    rows = rows.select_columns([*names, *(["seq_lengths"] if "seq_lengths" in rows.column_names else [])])
    worker = {
        "make": functools.partial(make, rows.select(range(1)).select_columns(list(names))),
        "identity": run.store.identity,
        "probe": run.judging.probe,
    }
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = 1  # a block for each shard
    context.max_errored_blocks = 0
    read = functools.partial(_blocks, rows, frozenset(missing), run.shard_tokens)
    with ray.data.DataContext.current(context):
        blocks = ray.data.from_items([{"all": 0}], override_num_blocks=1)
        # Without a CPU of its own, reading is not fused with scoring, which would then be one task
        blocks = blocks.map_batches(read, batch_size=1, batch_format="pyarrow", num_cpus=0)
        scored = blocks.map_batches(
            Worker, fn_constructor_kwargs=worker, batch_size=1, batch_format="pyarrow", zero_copy_batch=True,
            compute=ray.data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=2), **each,
        )  # fmt: skip
        results = iter(scored.iter_batches(batch_size=1, batch_format="pyarrow"))

    def columns(chunk: TokenChunk, progress: Callable[[int], object]) -> dict[str, np.ndarray]:
        try:
            table = next(results)
        except ray.exceptions.RayError as error:
            raise _told(error) from error
        if table[_FIRST][0].as_py() != chunk.first_row:
            raise RuntimeError(f"Ray returned row {table[_FIRST][0]} where row {chunk.first_row} was due")
        progress(chunk.size * (run.models.passes(run.models.columns) + (run.noisy is not None)))
        return {name: _flat(table, name) for name in table.column_names if name != _FIRST}

    yield columns


class Worker:
    """One actor: a run whose models stay in memory, called with one block at a time."""

    def __init__(self, make: Callable[[], ScoringRun], identity: dict[str, Any], probe: Any):
        run = make()
        if changed := differences(identity, run.store.identity):
            raise InputError(f"a Ray worker does not have what the command has: {'; '.join(changed)}")
        if probe is not None:
            run.models.state_columns = probe.state_columns(run.judging.special)
        self._stack = contextlib.ExitStack()
        self._columns = self._stack.enter_context(run.here())

    def __call__(self, table: pa.Table) -> pa.Table:
        flat = {name: _flat(table, name) for name in ROW_COLUMNS}
        chunk = TokenChunk(table[_FIRST][0].as_py(), _flat(table, _LENGTHS), flat, None)
        values = self._columns(chunk, lambda tokens: None)
        return pa.table({_FIRST: [chunk.first_row], **{name: _row(each) for name, each in values.items()}})


def _blocks(rows: Dataset, missing: frozenset[int], shard_tokens: int, _: pa.Table) -> Iterator[pa.Table]:
    """A block of one row for each missing shard. A lost one is made again from the data."""
    for index, chunk in enumerate(token_chunks(rows, ROW_COLUMNS, shard_tokens, documents=True)):
        if index in missing:
            flat = {name: _row(np.asarray(chunk.columns[name], np.int32)) for name in ROW_COLUMNS}
            yield pa.table({_FIRST: [chunk.first_row], _LENGTHS: _row(chunk.lengths), **flat})


def _row(values: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), pa.array(values))


def _flat(table: pa.Table, name: str) -> np.ndarray:
    return table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)


def _nothing(chunk: TokenChunk, progress: Callable[[int], object]) -> dict[str, np.ndarray]:
    raise AssertionError("no shard is missing")


def _room(ray: Any, workers: int | None, use_cpu: bool | None) -> tuple[int, dict[str, int]]:
    """The number of workers, and what Ray reserves for each."""
    resources = ray.cluster_resources()
    kind = "GPU" if resources.get("GPU") and not use_cpu else "CPU"
    room = int(resources.get(kind, 0))
    count = workers or (room if kind == "GPU" else sum(node["Alive"] for node in ray.nodes()))
    if not 1 <= count <= room:
        raise InputError(f"ray_workers={count}: the cluster has room for {room}, one for each {kind}")
    return count, {"num_gpus": 1} if kind == "GPU" else {"num_cpus": room // count}


def _leave_accelerator(run: ScoringRun) -> None:
    """The command's own models have done their work, hashes and judged rows: a worker needs their place."""
    run.models.own = None
    if run.noisy is not None:
        run.noisy.own = None
    if run.trainer.accelerator.device.type != "cpu" and not getattr(run.trainer.model, "is_quantized", False):
        cast(Any, run.trainer.model).to("cpu")


def _told(error: BaseException) -> BaseException:
    """What a worker had to say to the user, where it is that."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError):
            return InputError(str(cause))
        cause = getattr(cause, "cause", None) or cause.__cause__
    return error
