"""The cross-task matrix: forgetting the labels of task i, evaluated on task j, in the order of UPGMA clustering.

Rejected: clustering rows only, with the columns in the same order: the two orders answer different questions (which
labels act alike, which tasks are forgotten alike), and the paper's finding is that the second matters more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform


@dataclass(frozen=True)
class Matrix:
    """A cross-task matrix.

    Attributes:
        values: rows the task whose labels were forgotten, columns the evaluated task, both in UPGMA order; NaN: null.
        reasons: same shape, why a cell is null ("" where it is not).
        low, high: same shape, the ends of the intervals.
        row_linkage, column_linkage: scipy linkage matrices over the tasks in `row_leaves`, `column_leaves`.
        row_leaves, column_leaves: the tasks that could be clustered, sorted by name; the others stand last.
    """

    values: pd.DataFrame
    reasons: pd.DataFrame
    low: pd.DataFrame
    high: pd.DataFrame
    row_linkage: np.ndarray
    column_linkage: np.ndarray
    row_leaves: list[str]
    column_leaves: list[str]


def cross_task(table: pd.DataFrame, value: str = "ratio") -> Matrix:
    """The matrix of one variant, method, reference and split.

    Args:
        table: rows of `forgetting.forgetting`, at most one per (label_task, eval_task).
        value: "ratio" (the paper's R[i, j]), or a column that has no null from being near chance: "gap", "drop".
    """
    if table.duplicated(["label_task", "eval_task"]).any():
        raise ValueError("the matrix needs one variant, method and split; filter the table first")

    def wide(column: str) -> pd.DataFrame:
        return table.pivot(index="label_task", columns="eval_task", values=column)

    values = wide(value).astype(np.float64)
    if value == "ratio":
        reasons = wide("ratio_reason")
    else:
        reasons = wide("outcome_reason")
    reasons = reasons.astype(object).where(values.isna(), "").fillna("not evaluated")
    rows, row_leaves, row_linkage = upgma(values)
    columns, column_leaves, column_linkage = upgma(values.T)
    low, high = (wide(f"{value}_{end}").astype(np.float64).loc[rows, columns] for end in ("low", "high"))
    return Matrix(
        values.loc[rows, columns],
        reasons.loc[rows, columns],
        low,
        high,
        row_linkage,
        column_linkage,
        row_leaves,
        column_leaves,
    )


def upgma(values: pd.DataFrame) -> tuple[list[str], list[str], np.ndarray]:
    """The order of the rows by average linkage (UPGMA), with leaves flipped so that neighbours are near.

    The distance of two rows is Euclidean over the columns that both have, scaled up by sqrt(all / shared) for those
    that are null in either. Rows that share no column are as far apart as the farthest pair that does. A row without
    any value is not clustered; such rows stand last, by name.

    Returns:
        The names in order; the clustered names, sorted, which the linkage numbers; the linkage (m - 1, 4), empty for
        fewer than two rows.
    """
    leaves = sorted(values.index[values.notna().any(axis=1)])
    rest = sorted(values.index.difference(leaves))
    if len(leaves) < 2:
        return [*leaves, *rest], leaves, np.zeros((0, 4))
    linkage = hierarchy.linkage(distances(values.loc[leaves].to_numpy()), method="average", optimal_ordering=True)
    return [*(leaves[i] for i in hierarchy.leaves_list(linkage)), *rest], leaves, linkage


def distances(values: np.ndarray) -> np.ndarray:
    """Condensed distances between the rows of values (m, k), which may hold NaN; see `upgma`."""
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0)
    shared = known[:, None] & known[None]  # (m, m, k)
    squares = np.where(shared, (filled[:, None] - filled[None]) ** 2, 0.0).sum(axis=2)
    count = shared.sum(axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.sqrt(squares * values.shape[1] / count)
    farthest = found[count > 0].max() if (count > 0).any() else 0.0
    found[count == 0] = farthest
    np.fill_diagonal(found, 0.0)
    return squareform(found, checks=False)
