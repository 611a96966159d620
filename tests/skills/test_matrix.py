"""The cross-task matrix and its order."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster import hierarchy
from scipy.spatial.distance import pdist

from selsft.skills import matrix

NAN = float("nan")


def frame(values, rows, columns):
    """Long rows as of `forgetting`, from a matrix; NaN becomes a null with a reason, None is not evaluated."""
    found = []
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            value = values[i][j]
            if value is None:
                continue
            null = np.isnan(value)
            found.append(
                {
                    "label_task": row,
                    "eval_task": column,
                    "ratio": value,
                    "ratio_low": value - 0.1,
                    "ratio_high": value + 0.2,
                }
                | {"ratio_reason": f"{row} on {column} near chance" if null else "", "outcome_reason": ""}
            )
    return pd.DataFrame(found)


def test_average_linkage_by_hand():
    # On a line: 0, 1, 5, 11. UPGMA joins 0 and 1 (1), then 5 to both (mean of 5 and 4), then 11 (mean of 11, 10, 6).
    values = pd.DataFrame({"x": [5.0, 0.0, 11.0, 1.0]}, index=["five", "zero", "eleven", "one"])
    order, leaves, linkage = matrix.upgma(values)
    assert leaves == ["eleven", "five", "one", "zero"]
    np.testing.assert_allclose(linkage[:, 2], [1.0, 4.5, 9.0])
    np.testing.assert_allclose(linkage[:, 3], [2, 3, 4])
    assert order in (["zero", "one", "five", "eleven"], ["eleven", "five", "one", "zero"])


def test_clusters_stand_together():
    rng = np.random.default_rng(0)
    names = [f"t{i}" for i in range(8)]
    group = [0, 1, 0, 1, 1, 0, 0, 1]
    values = [[float(group[i] == group[j]) + 0.05 * rng.random() for j in range(8)] for i in range(8)]
    found = matrix.cross_task(frame(values, names, names))
    for order in (found.values.index, found.values.columns):
        groups = [group[int(name[1:])] for name in order]
        assert groups in ([0] * 4 + [1] * 4, [1] * 4 + [0] * 4)
    for i in names:
        for j in names:
            assert found.values.at[i, j] == values[int(i[1:])][int(j[1:])]
            assert found.low.at[i, j] == pytest.approx(found.values.at[i, j] - 0.1)
            assert found.high.at[i, j] == pytest.approx(found.values.at[i, j] + 0.2)
    assert (found.reasons == "").all(axis=None)
    assert found.row_linkage.shape == (7, 4) and found.column_linkage.shape == (7, 4)


def test_rows_and_columns_have_their_own_order():
    # Rows pair as (a, c), (b, d); columns as (a, b), (c, d).
    values = [[0.0, 0.1, 1.0, 1.1], [5.0, 5.1, 9.0, 9.1], [0.2, 0.3, 1.2, 1.3], [5.2, 5.3, 9.2, 9.3]]
    found = matrix.cross_task(frame(values, "abcd", "abcd"))
    assert {frozenset(found.values.index[:2])} <= {frozenset("ac"), frozenset("bd")}
    assert {frozenset(found.values.columns[:2])} <= {frozenset("ab"), frozenset("cd")}


def test_null_and_missing_cells():
    values = [[0.9, NAN, 0.8, NAN], [0.9, 0.1, 0.7, NAN], [NAN, NAN, NAN, NAN], [0.1, 0.9, None, NAN]]
    found = matrix.cross_task(frame(values, "abcd", "wxyz"))
    assert list(found.values.index)[-1] == "c" and found.row_leaves == ["a", "b", "d"]
    assert list(found.values.columns)[-1] == "z" and found.column_leaves == ["w", "x", "y"]
    assert found.values.loc["c"].isna().all() and found.reasons.at["c", "w"] == "c on w near chance"
    assert found.reasons.at["a", "x"] == "a on x near chance"
    assert found.reasons.at["d", "y"] == "not evaluated" and found.reasons.at["b", "x"] == ""


def test_distances_with_nulls_by_hand():
    values = np.array([[0.0, 0.0, NAN, NAN], [3.0, 4.0, 1.0, NAN], [NAN, NAN, 1.0, 7.0]])
    # First pair: sqrt(25 * 4/2); the first and the last share nothing: the farthest; the others 0 over one column.
    np.testing.assert_allclose(matrix.distances(values), [np.sqrt(50), np.sqrt(50), 0.0])


@settings(max_examples=40, deadline=None)
@given(m=st.integers(2, 7), k=st.integers(1, 5), seed=st.integers(0, 1000))
def test_without_nulls_it_is_scipy(m, k, seed):
    values = np.random.default_rng(seed).standard_normal((m, k))
    np.testing.assert_allclose(matrix.distances(values), pdist(values), rtol=1e-12)
    names = [f"t{i}" for i in range(m)]
    order, leaves, linkage = matrix.upgma(pd.DataFrame(values, index=names))
    np.testing.assert_allclose(linkage[:, 2], hierarchy.linkage(pdist(values), "average")[:, 2], rtol=1e-12)
    assert sorted(order) == names == leaves


def test_few_rows():
    assert matrix.upgma(pd.DataFrame({"x": [1.0]}, index=["a"]))[0] == ["a"]
    order, leaves, linkage = matrix.upgma(pd.DataFrame({"x": [NAN, NAN]}, index=["b", "a"]))
    assert (order, leaves, linkage.shape) == (["a", "b"], [], (0, 4))


def test_two_methods_at_once_are_refused():
    rows = frame([[0.1, 0.2]], "a", "xy")
    with pytest.raises(ValueError, match="one variant, method and split"):
        matrix.cross_task(pd.concat([rows, rows]))
