"""The user's own rows beside their scores: which row of the data each scored row comes from, and its columns as they
were.

TRL drops rows without a label, may shuffle them, and appends EOS to their text. So rows get a number before it sees
them, and the columns are read from the data again. They lie in a folder of their own: shards are hashed, compared and
imported by their token columns alone. Rejected: text in the shards, which would make every change of an id another set
of scores.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset, Value

from ..records import replaced
from .cards import SOURCE
from .columns import TOKEN_COLUMNS
from .rows import Split

NUMBER, SOURCE_ROW, FILE = "selsft_row", "source_row", "rows.parquet"
_PREPARED = {"input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks", "seq_lengths", NUMBER}


def numbered(data: Split) -> Split:
    """`data` with the number of each row, which survives preparation; streams stay as they are."""
    return data if isinstance(data, IterableDataset) else data.add_column(NUMBER, np.arange(len(data)))


def write_source_rows(folder: Path, source: Split, prepared: Split) -> bool:
    """Write the rows of `source` behind the rows of `prepared`, in their order, without token columns. `source_row`
    (from 0) is the number of the row, unless the data brings a column of that name.

    Returns:
        whether there are any: packed and streamed rows have lost their numbers.
    """
    if isinstance(source, IterableDataset) or NUMBER not in (prepared.column_names or []):
        (folder / SOURCE / FILE).unlink(missing_ok=True)  # of rows that were scored before
        return False
    numbers = np.asarray(cast(Dataset, prepared).select_columns([NUMBER]).with_format("arrow")[:][NUMBER])
    names = [name for name in source.column_names if name not in {*_PREPARED, *TOKEN_COLUMNS}]
    if not names:
        rows = Dataset.from_dict({SOURCE_ROW: numbers})
    else:
        rows = source.select_columns(names).select(numbers)
        rows = rows if SOURCE_ROW in names else rows.add_column(SOURCE_ROW, numbers)
    (folder / SOURCE).mkdir(exist_ok=True)
    with replaced(folder / SOURCE / FILE) as file:
        rows.to_parquet(file)
    return True


def read_source_rows(folder: str | Path) -> Dataset | None:
    """The rows behind those of a folder of scores or tokens, in their order; `None` where they are not known."""
    path = Path(folder) / SOURCE / FILE
    return Dataset.from_parquet(str(path)) if path.is_file() else None


def with_own_columns(table: pa.Table, data: Dataset, without: Collection[str] = ()) -> pa.Table:
    """A table about rows of `data`, whose column `row` numbers them, with those of their columns that hold one value:
    ids, sources, `source_row`. A name that the table has already gets `own_` in front."""
    names = [name for name, kind in data.features.items() if isinstance(kind, Value) and name not in without]
    if not names:
        return table
    own = data.select_columns(names).select(table["row"].to_pylist()).with_format("arrow")[:]
    for name in names:
        table = table.append_column(f"own_{name}" if name in table.column_names else name, own[name])
    return table
