"""From scores to token classes, on cases worked out by hand, and properties over random ones."""

import functools
import itertools
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

import selsft.data.chunks
from selsft.data.chunks import ColumnWriter, supervised_mask, token_chunks, with_column
from selsft.selection.excess import weigh_batches
from selsft.selection.quantile import boundary_of_fraction
from selsft.selection.weights import add_token_weights, row_weights
from selsft.training.schedules import FORGET_SCHEDULES, forget_weight_at
from tests.support.oracle import label_tokens

SCORES = np.array([-3.0, -1.0, -0.5, 0.0, 2.0])


def test_threshold_is_strict():
    assert label_tokens(SCORES, negative_threshold=1.0).tolist() == [-1, 1, 1, 1, 1]


def test_fraction_keeps_the_best():
    assert label_tokens(SCORES, positive_fraction=0.6).tolist() == [-1, -1, 1, 1, 1]


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, [-1] * 5), (1.0, [1] * 5)])
def test_fraction_at_the_ends(fraction, expected):
    assert label_tokens(SCORES, positive_fraction=fraction).tolist() == expected


def test_fraction_is_not_fooled_by_rounding():
    assert (1 - 0.9) * 10 < 1  # 0.9999999999999998
    labels = label_tokens(np.arange(10.0), positive_fraction=1 - 0.9)
    assert (labels == 1).sum() == 1


def test_equal_scores_are_all_positive():
    assert label_tokens(np.zeros(4), positive_fraction=0.5).tolist() == [1, 1, 1, 1]


def test_neutral_band_is_around_the_boundary():
    assert label_tokens(SCORES, negative_threshold=1.0, neutral_band=0.5).tolist() == [-1, 0, 0, 1, 1]


def test_protected_tokens_stay_positive():
    protected = np.array([True, False, False, False, True])
    assert label_tokens(SCORES, negative_threshold=-1.0, protected=protected).tolist() == [1, -1, -1, -1, 1]


@pytest.mark.parametrize("rules", [{}, {"negative_threshold": 1.0, "positive_fraction": 0.5}])
def test_exactly_one_rule(rules):
    with pytest.raises(ValueError, match="exactly one of negative_threshold"):
        label_tokens(SCORES, **rules)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_must_be_finite(bad):
    with pytest.raises(ValueError, match="score number 1 is"):
        label_tokens(np.array([0.0, bad]), negative_threshold=1.0)


def settings_of(**changes):
    rule = {"negative_threshold": 1.0, "positive_fraction": None, "neutral_band": 0.0, "selection_scope": "global"}
    rule |= {"score": "influence", "gate_reference_prob": None, "max_negative_share": None, "seed": 0}
    rule |= {"score_base_weight": 1.0, "pooling": "token", "score_lookahead": 0.0, "score_row_worst": None}
    made = SimpleNamespace(**{**rule, "pools_words": False, "forget_weight": 0.25, **changes})
    made.effective_threshold, made.effective_fraction = made.negative_threshold, made.positive_fraction
    return made


def weigh(scores, args, supervised=None):
    """Weights of a collated batch of such scores; a first token, which nothing predicts, stands before them."""
    scores = torch.nn.functional.pad(torch.tensor(scores, dtype=torch.float32), (1, 0))
    labels = torch.zeros(scores.shape, dtype=torch.long)
    if supervised is not None:
        labels[:, 1:].masked_fill_(~torch.tensor(supervised), -100)
    batch = {"input_ids": torch.zeros_like(labels), "labels": labels, "ref_logps": scores}
    weigh_batches([batch], [torch.zeros_like(scores)], args, special_ids=np.zeros(0, np.int64))
    assert not batch["token_weights"][:, 0].any()
    return batch["token_weights"][:, 1:].tolist()


def test_scope_decides_which_tokens_compete():
    scores = [[-4.0, -3.0], [1.0, 2.0]]
    fraction = {"negative_threshold": None, "positive_fraction": 0.5}
    assert weigh(scores, settings_of(**fraction)) == [[-1, -1], [1, 1]]
    assert weigh(scores, settings_of(**fraction, selection_scope="sequence")) == [[-1, 1], [-1, 1]]


def test_unsupervised_tokens_neither_count_nor_get_a_weight():
    args = settings_of(negative_threshold=None, positive_fraction=0.5)
    assert weigh([[-9.0, -9.0, 1.0, 2.0]], args, [[False, False, True, True]]) == [[0, 0, -1, 1]]


def test_forget_weight_zero_ignores_the_negatives():
    assert weigh([[-2.0, 0.0]], settings_of(forget_weight=0.0)) == [[0, 1]]


def test_a_batch_without_supervised_tokens_has_no_weights():
    args = settings_of(negative_threshold=None, positive_fraction=0.5)
    assert weigh([[-2.0, 0.0]], args, [[False, False]]) == [[0, 0]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40), st.floats(0, 1), st.floats(0, 3))
def test_a_better_score_never_gets_a_worse_class(scores, fraction, band):
    values = np.array(scores, dtype=np.float32)
    labels = label_tokens(values, positive_fraction=fraction, neutral_band=band)
    assert (np.diff(labels[np.argsort(values, kind="stable")]) >= 0).all()
    if band == 0:
        assert (labels == 1).sum() >= int(fraction * len(scores))


def test_schedules():
    weights = {name: [forget_weight_at(s, 4, 0.2, name) for s in (0, 2, 4, 9)] for name in FORGET_SCHEDULES}
    assert weights["constant"] == [0.2] * 4
    assert weights["linear"] == pytest.approx([0, 0.1, 0.2, 0.2])
    assert weights["cosine"] == pytest.approx([0, 0.1, 0.2, 0.2])
    with pytest.raises(ValueError, match="forget_schedule='step'"):
        forget_weight_at(0, 1, 0.2, "step")


# --- a whole data set, in chunks ---------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=60),
    st.floats(0, 1),
    st.integers(1, 7),
)
def test_boundary_is_the_order_statistic(scores, fraction, parts):
    """For any floats: subnormal, huge, both zeros, ties; cut into any number of arrays."""
    values = np.array(scores, np.float32)
    keep = int(fraction * values.size + 1e-9)
    wanted = np.inf if keep == 0 else np.sort(values)[values.size - keep]
    assert boundary_of_fraction(lambda: np.array_split(values, parts), fraction) == wanted


def test_boundary_of_parts_that_are_reduced_is_that_of_the_whole():
    """What every process counts is summed: here each histogram is counted twice, which moves no quantile."""
    values = np.random.default_rng(0).normal(size=501).astype(np.float32)
    whole = boundary_of_fraction(lambda: [values, values], 0.3)
    assert boundary_of_fraction(lambda: [values], 0.3, reduce=lambda counts: 2 * counts) == whole
    assert boundary_of_fraction(lambda: [], 0.3) == -np.inf


def scored_data(rows=60, seed=0, packed=False):
    """Rows of 0 to 12 tokens, a third of them without a label, scores with ties, two or three documents if packed."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0 if not packed else 3, 13, rows)
    draw = lambda make: [make(int(n)).tolist() for n in lengths]  # noqa: E731
    columns = {
        "input_ids": draw(lambda n: rng.integers(1, 9, n)),
        "labels": draw(lambda n: np.where(rng.random(n) < 0.3, -100, 5)),
        "base_logps": draw(lambda n: -rng.integers(0, 9, n).astype(np.float32) / 2),
        "ref_logps": draw(lambda n: -rng.integers(0, 9, n).astype(np.float32) / 2),
    }
    if packed:
        columns["seq_lengths"] = [[2, int(n) - 2] if n < 6 else [1, 3, int(n) - 4] for n in lengths]
    return Dataset.from_dict(columns)


def by_hand(data, args, special_ids, padding_free):
    """Row by row, with nothing but `label_tokens`."""
    scores, masks, safe = [], [], []
    for row in data:
        mask = np.array([label != -100 for label in row["labels"]], bool)
        starts = np.cumsum([0, *row["seq_lengths"]])[:-1] if padding_free and "seq_lengths" in row else [0]
        for start in starts:
            mask[start : start + 1] = False
        scores.append((np.float32(row["ref_logps"]) - np.float32(row["base_logps"]))[mask])
        safe.append(np.isin(row["input_ids"], special_ids)[mask])
        masks.append(mask)
    rule = {"negative_threshold": args.effective_threshold, "positive_fraction": args.positive_fraction}
    label = functools.partial(label_tokens, neutral_band=args.neutral_band, **rule)
    if args.selection_scope == "sequence":
        labels = [label(part, protected=guard) for part, guard in zip(scores, safe, strict=True)]
    else:
        flat = label(np.concatenate(scores), protected=np.concatenate(safe))
        labels = np.split(flat, np.cumsum([len(part) for part in scores])[:-1])
    wanted = []
    for mask, part in zip(masks, labels, strict=True):
        row = np.zeros(mask.size)
        row[mask] = part
        wanted.append(row.tolist())
    return wanted


RULES = {
    "fraction": {"negative_threshold": None, "positive_fraction": 0.6},
    "threshold": {"negative_threshold": 0.5},
    "band": {"negative_threshold": None, "positive_fraction": 0.5, "neutral_band": 0.5},
    "sequence": {"negative_threshold": None, "positive_fraction": 0.7, "selection_scope": "sequence"},
    "sequence_none": {"negative_threshold": None, "positive_fraction": 0.0, "selection_scope": "sequence"},
    "sequence_band": {
        "negative_threshold": None, "positive_fraction": 0.4, "selection_scope": "sequence", "neutral_band": 0.6,
    },
}  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 17, 2**20])
@pytest.mark.parametrize("view", ["rows", "shuffled", "packed"])
@pytest.mark.parametrize("rule", RULES)
def test_chunks_give_what_the_rows_give(rule, view, chunk, monkeypatch):
    monkeypatch.setattr(selsft.data.chunks, "TOKENS_PER_CHUNK", chunk)
    monkeypatch.setattr(selsft.data.chunks, "_ROWS_PER_READ", 11)
    data = scored_data(packed=view == "packed")
    data = data.shuffle(seed=3) if view == "shuffled" else data
    args, special = settings_of(**RULES[rule]), np.array([2, 7])
    made = add_token_weights(data, args, special, padding_free=view == "packed")
    assert made["token_weights"] == by_hand(data, args, special, view == "packed")
    assert made["input_ids"] == data["input_ids"]
    assert {value for row in made["token_weights"] for value in row} >= (
        {-1, 0, 1} if rule != "sequence_none" else {0}
    )


def test_weights_are_bytes_on_disk():
    made = add_token_weights(scored_data(), settings_of(), np.zeros(0, np.int64), False)
    assert str(made.features["token_weights"]).startswith("List(Value('int8')")
    assert any(file["filename"].endswith(".arrow") for file in made.cache_files)
    again = add_token_weights(made, settings_of(negative_threshold=-9.0), np.zeros(0, np.int64), False)
    assert again.column_names.count("token_weights") == 1 and again["token_weights"] != made["token_weights"]


def on_disk(tokens):
    rng, lengths = np.random.default_rng(0), np.full(tokens // 50, 50)
    data = None
    for name, dtype in (
        ("input_ids", "int64"),
        ("labels", "int64"),
        ("base_logps", "float32"),
        ("ref_logps", "float32"),
    ):
        writer = ColumnWriter(name, dtype)
        for part in np.array_split(lengths, 8):
            writer.write(rng.normal(size=int(part.sum())).astype(dtype), part)
        column = writer.dataset()
        data = column if data is None else with_column(data, name, column)
    return data


@pytest.mark.parametrize("rule", ["fraction", "threshold", "sequence"])
def test_memory_does_not_grow_with_the_data(rule, monkeypatch):
    monkeypatch.setattr(selsft.data.chunks, "TOKENS_PER_CHUNK", 2**14)
    monkeypatch.setattr(selsft.data.chunks, "_ROWS_PER_READ", 500)
    peaks = []
    for tokens in (200_000, 1_600_000):
        data = on_disk(tokens)
        tracemalloc.start()
        add_token_weights(data, settings_of(**RULES[rule]), np.zeros(0, np.int64), False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000  # 1.4 million more tokens: less than 0.15 bytes for each


def test_one_missing_value_or_wrong_document_length_is_named():
    data = scored_data()
    short = data.map(
        lambda row, index: {"ref_logps": row["ref_logps"][: 3 if index == 40 else None]}, with_indices=True
    )
    with pytest.raises(ValueError, match="row 40: column 'ref_logps' has 3 values"):
        add_token_weights(short, settings_of(), np.zeros(0, np.int64), False)
    packed = scored_data(packed=True).map(
        lambda row, index: {"seq_lengths": [1] if index == 7 else row["seq_lengths"]}, with_indices=True
    )
    with pytest.raises(ValueError, match="row 7: seq_lengths add up to 1"):
        add_token_weights(packed, settings_of(), np.zeros(0, np.int64), True)


def test_blocks_are_cut_between_rows(monkeypatch):
    monkeypatch.setattr(selsft.data.chunks, "TOKENS_PER_CHUNK", 6)
    data = Dataset.from_dict({"labels": [[1] * n for n in (2, 3, 0, 2, 9, 6, 1)]})
    chunks = list(token_chunks(data, ["labels"]))
    assert [chunk.lengths.tolist() for chunk in chunks] == [[2, 3, 0], [2], [9], [6], [1]]
    assert [chunk.first_row for chunk in chunks] == [0, 3, 4, 5, 6]


def test_supervised_tokens_have_a_label_and_a_past():
    data = Dataset.from_dict({"labels": [[5, 5, -100, 5], [], [5, 5, 5]], "seq_lengths": [[3, 1], [], [1, 2]]})
    (chunk,) = token_chunks(data, ["labels"])
    assert supervised_mask(chunk, padding_free=False).tolist() == [False, True, False, True, False, True, True]
    assert supervised_mask(chunk, padding_free=True).tolist() == [False, True, False, False, False, False, True]
    assert chunk.columns["labels"][0] == 5 and [chunk.row_of(token) for token in (0, 3, 4, 6)] == [0, 0, 2, 2]


# --- gate and cap -------------------------------------------------------------------------------------------------


def one_row(scores, ref=None, **columns):
    """One row whose first token is not supervised, so that `scores` are those of tokens 1 to n."""
    ref = np.array([0.0] * len(scores) if ref is None else ref, np.float32)
    return Dataset.from_dict(
        {
            "input_ids": [[9] * (len(scores) + 1)],
            "labels": [[-100] + [9] * len(scores)],
            "base_logps": [[0.0, *(ref - np.array(scores, np.float32)).tolist()]],
            "ref_logps": [[0.0, *ref.tolist()]],
            **{name: [[type(values[0])(0), *values]] for name, values in columns.items()},
        }
    )


def weights_of(data, special=(), **changes):
    (row,) = add_token_weights(data, settings_of(**changes), np.array(special, np.int64), False)["token_weights"]
    return row[1:]


def test_gate_keeps_what_the_reference_finds_likely():
    """score < -1 and p_ref < 0.25: only the second and the last token."""
    data = one_row([-2, -2, -2, 0, -3], ref=np.log([0.5, 0.2, 0.25, 0.01, 0.1]))
    assert weights_of(data) == [-1, -1, -1, 1, -1]
    assert weights_of(data, gate_reference_prob=0.25) == [1, -1, 1, 1, -1]
    share = {"negative_threshold": None, "positive_fraction": 0.2}
    assert weights_of(data, **share) == [-1, -1, -1, 1, -1]
    assert weights_of(data, **share, gate_reference_prob=0.25) == [1, -1, 1, 1, -1]


def test_cap_keeps_the_worst_and_leaves_the_others_alone():
    data = one_row([-2, -5, -3, 0, -3])
    assert weights_of(data, max_negative_share=0.4) == [0, -1, -1, 1, 0]  # of the two at -3 the first
    assert weights_of(data, max_negative_share=0.39) == [0, -1, 0, 1, 0]
    assert weights_of(data, max_negative_share=0.0) == [0, 0, 0, 1, 0]
    assert weights_of(data, max_negative_share=1.0) == weights_of(data) == [-1, -1, -1, 1, -1]


def test_cap_counts_each_document_of_a_packed_row():
    data = one_row([-2, -5, 0, -4, -4, -3]).add_column("seq_lengths", [[3, 4]])
    assert weights_of(data, max_negative_share=0.5) == [0, -1, 1, -1, -1, 0]  # tokens of documents: 2 and 4
    assert weights_of(data.remove_columns("seq_lengths"), max_negative_share=0.5) == [0, -1, 1, -1, -1, 0]
    assert weights_of(data, max_negative_share=0.25) == [0, 0, 1, -1, 0, 0]
    assert weights_of(data.remove_columns("seq_lengths"), max_negative_share=0.25) == [0, -1, 1, 0, 0, 0]


# --- scores without a reference -----------------------------------------------------------------------------------


RANDOM = {"score": "random", "negative_threshold": None, "positive_fraction": 0.7}


def test_random_ranking_depends_on_seed_and_position_alone(monkeypatch):
    data = scored_data().remove_columns(["base_logps", "ref_logps"])
    wanted = add_token_weights(data, settings_of(**RANDOM), np.zeros(0, np.int64), False)["token_weights"]
    flat = np.array(list(itertools.chain(*wanted)))
    n = int((flat != 0).sum())
    assert (flat > 0).sum() == int(0.7 * n + 1e-9) and n > 100
    monkeypatch.setattr(selsft.data.chunks, "TOKENS_PER_CHUNK", 5)
    assert add_token_weights(data, settings_of(**RANDOM), np.zeros(0, np.int64), False)["token_weights"] == wanted
    other = add_token_weights(data, settings_of(**RANDOM, seed=1), np.zeros(0, np.int64), False)["token_weights"]
    assert other != wanted


def test_random_negatives_know_nothing_of_the_scores():
    data = on_disk(200_000)
    made = add_token_weights(data, settings_of(**RANDOM), np.zeros(0, np.int64), False)
    (chunk,) = token_chunks(made, ["base_logps", "ref_logps", "token_weights"])
    scores, weights = chunk.columns["ref_logps"] - chunk.columns["base_logps"], chunk.columns["token_weights"]
    assert abs(scores[weights < 0].mean() - scores[weights > 0].mean()) < 5 * np.sqrt(2 / 60_000)


def test_oracle_takes_the_mask():
    data = one_row([0, 0, 0, 0], negative_mask=[1, 0, 1, 0])
    oracle = {"score": "oracle", "negative_threshold": None}
    assert weights_of(data, **oracle) == [-1, 1, -1, 1]
    assert weights_of(data, **oracle, forget_weight=0.0) == [0, 1, 0, 1]
    assert weights_of(data, special=[9], **oracle) == [1, 1, 1, 1]
    flags = one_row([0, 0], negative_mask=[True, False])
    assert weights_of(flags, **oracle) == [-1, 1]
    with pytest.raises(ValueError, match="row 0: column 'negative_mask' holds 2; it must be 0 or 1"):
        weights_of(one_row([0, 0], negative_mask=[2, 0]), **oracle)


def test_given_scores_are_ranked_like_computed_ones():
    scores = [-2.0, -0.5, 3.0, -1.5]
    data = one_row(scores, token_scores=scores).remove_columns(["base_logps", "ref_logps"])
    for changes in ({}, {"negative_threshold": None, "positive_fraction": 0.25}, {"neutral_band": 0.6}):
        assert weights_of(data, score="given", **changes) == weights_of(one_row(scores), **changes)


def test_a_streamed_row_is_labelled_like_a_loaded_one():
    data = scored_data(packed=True)
    data = data.add_column("token_scores", [[float(x) for x in row] for row in data["ref_logps"]])
    args = settings_of(score="given", negative_threshold=2.0, max_negative_share=0.5)
    loaded = add_token_weights(data, args, np.array([3]), True)["token_weights"]
    assert [row_weights(row, args, np.array([3]), True).tolist() for row in data] == loaded
