"""The probe: finds planted errors, is judged out of fold, and says the same however rows are batched."""

import copy
import weakref

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from sklearn.metrics import roc_auc_score

from selsft import DataCollatorForSelectiveSFT, SelectiveSFTConfig, SelectiveSFTTrainer
from selsft.data.chunks import TokenChunk
from selsft.data.judged import judged_rows
from selsft.data.tokenizers import special_ids, tokenizer_sha256
from selsft.errors import InputError
from selsft.evaluation.judged import Examples, threshold_for
from selsft.scoring.frozen import FrozenModels
from selsft.scoring.probe import (
    Design,
    Probe,
    design_of,
    fit_probe,
    load_fit,
    load_probe,
    probe_layers,
    row_hashes,
    save_fit,
    save_probe,
)
from tests.support import judged, tiny

SPECIAL = special_ids(tiny.tokenizer())
# Made once: another config would reset the state of the accelerators
ARGS = SelectiveSFTConfig("unused", use_cpu=True, bf16=False, max_length=64)


def models_of(model=None, tokens=64):
    args = copy.copy(ARGS)
    args.scoring_batch_tokens = tokens
    collator = DataCollatorForSelectiveSFT(pad_token_id=0)
    return FrozenModels(model or tiny.llama(), None, tiny.tokenizer(), args, Accelerator(cpu=True), collator)


def sample_of(count, seed=0, **changes):
    rows = [{**row, **changes} for row in judged.rows(count, seed)]
    return judged_rows(Dataset.from_list(rows), tiny.tokenizer(), ARGS)


def chunk_of(sample):
    return TokenChunk(0, sample.lengths, {"input_ids": sample.input_ids, "labels": sample.labels}, None)


@pytest.fixture(scope="module")
def fitted():
    models, sample = models_of(), sample_of(40)
    with models.ready():
        design = design_of(models, sample, SPECIAL)
    return models, sample, design, fit_probe(design, shares=(0.5,))


def test_layers_are_about_the_middle_third():
    assert probe_layers(30) == [12, 14, 16, 18, 20]
    assert probe_layers(2) == [1] and probe_layers(1) == [1]


def test_features_are_the_models_states(fitted):
    _, sample, design, _ = fitted
    model = tiny.llama()
    known = np.flatnonzero(sample.wrong >= 0)
    assert np.array_equal(design.positions, known) and np.array_equal(design.wrong, sample.wrong[known] == 1)
    features = design.features(1)
    ends = np.cumsum(sample.lengths)
    for row in (0, 1, 39):
        start, end = ends[row] - sample.lengths[row], ends[row]
        ids = torch.from_numpy(sample.input_ids[start:end].astype(np.int64))[None]
        with torch.no_grad():
            out = model(input_ids=ids, output_hidden_states=True)
        states, logps = out.hidden_states[1][0].numpy(), out.logits[0].log_softmax(-1)
        for index in np.flatnonzero(sample.row[known] == row):
            token = known[index] - start
            logp = logps[token - 1, ids[0, token]], logps[token, ids[0, token + 1]]  # the EOS is judged by nobody
            np.testing.assert_allclose(features[index], [*states[token], *states[token + 1], *logp], atol=2e-4)


def test_planted_errors_are_found_in_new_rows(fitted):
    models, _, _, fit = fitted
    fresh = sample_of(30, seed=5)
    models.state_columns = fit.probe.state_columns(SPECIAL)
    with models.ready():
        scores = models.score(chunk_of(fresh), models.columns)["probe_scores"]
    known = fresh.wrong >= 0
    assert roc_auc_score(fresh.wrong[known], -scores[known]) > 0.99
    assert ((scores <= 0) & (scores >= -1)).all()
    assert (scores[fresh.labels == -100] == 0).all()


def noise(n=300, hidden=600, copies=1):
    """States that say nothing about what is wrong; with copies, each group has the same example several times."""
    rng = np.random.default_rng(0)
    states, wrong = torch.from_numpy(rng.normal(size=(n, hidden)).astype(np.float32)), rng.random(n) < 0.3
    which = np.repeat(np.arange(n), copies)
    pairs = np.stack([which, which], 1)
    return Design("token", np.arange(which.size), wrong[which], which, np.zeros((which.size, 2), np.float32),
                  {1: states}, pairs)  # fmt: skip


def test_out_of_fold_scores_know_nothing_of_noise():
    for copies in (1, 3):
        design = noise(copies=copies)
        fit = fit_probe(design)
        inside = design.features(1) @ np.concatenate([*fit.probe.weights[1].T, fit.probe.loss])
        assert roc_auc_score(design.wrong, inside) > 0.9  # it has learnt them by heart
        assert abs(roc_auc_score(design.wrong, fit.logits) - 0.5) < 0.12
    leaking = noise(copies=3)
    leaking.groups = np.arange(leaking.wrong.size)  # copies of one example on both sides
    assert roc_auc_score(leaking.wrong, fit_probe(leaking).logits) > 0.8


def test_logits_are_calibrated(fitted):
    rng = np.random.default_rng(1)
    n = 4000
    signal = rng.normal(size=n)
    wrong = rng.random(n) < 1 / (1 + np.exp(2 - 1.5 * signal))
    states = torch.from_numpy(np.stack([signal, rng.normal(size=n)], 1).astype(np.float32))
    design = Design("token", np.arange(n), wrong, np.arange(n), np.zeros((n, 2), np.float32), {1: states},
                    np.stack([np.arange(n)] * 2, 1))  # fmt: skip
    probability = 1 / (1 + np.exp(-fit_probe(design).logits))
    for low, high in ((0, 0.1), (0.1, 0.3), (0.3, 1)):
        inside = (probability >= low) & (probability < high)
        assert abs(wrong[inside].mean() - probability[inside].mean()) < 0.05


def test_a_threshold_keeps_its_precision_on_unseen_tokens():
    """Chosen on logits out of fold, and used with the probe that was fitted on all: both must be on one scale."""
    rng = np.random.default_rng(2)
    truth = rng.normal(size=60)

    def drawn(n):
        states = rng.normal(size=(n, 60)).astype(np.float32)
        return states, rng.random(n) < 1 / (1 + np.exp(2.5 - states @ truth / 4))

    for _ in range(2):
        states, wrong = drawn(3000)
        rows = np.arange(3000) // 20
        design = Design("token", np.arange(3000), wrong, rows, np.zeros((3000, 2), np.float32),
                        {1: torch.from_numpy(states)}, np.stack([np.arange(3000)] * 2, 1))  # fmt: skip
        fit = fit_probe(design)
        cut = threshold_for(Examples(fit.logits, wrong, rows), 0.6)
        fresh, right = drawn(20_000)
        flagged = fresh @ fit.probe.weights[1].sum(1) + fit.probe.bias > cut.negative_threshold
        assert right[flagged].mean() == pytest.approx(0.6, abs=0.1)
        assert flagged.mean() == pytest.approx(cut.flagged / 3000, rel=0.35)


def test_batches_do_not_matter(fitted):
    models, sample, _, fit = fitted
    found = []
    for tokens in (1, 64, 4096):
        models = models_of(tokens=tokens)
        models.state_columns = fit.probe.state_columns(SPECIAL)
        with models.ready():
            found.append(models.score(chunk_of(sample), models.columns)["probe_scores"])
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    np.testing.assert_allclose(found[0], found[2], atol=1e-5)


@pytest.mark.parametrize("kind", ["token", "row"])
def test_padding_and_concatenation_say_the_same(kind):
    rng = np.random.default_rng(0)
    lengths = [5, 3, 4]
    probe = Probe(kind, {1: rng.normal(size=(6, 2)).astype(np.float32)}, rng.normal(size=2 + (kind == "row")).astype(np.float32), 0.1)  # fmt: skip  # noqa: E501
    columns = probe.state_columns(np.array([1])).columns
    states = [torch.from_numpy(rng.normal(size=(n, 6)).astype(np.float32)) for n in lengths]
    logps = [-torch.rand(n) for n in lengths]
    ids = [torch.tensor([5] * (n - 1) + [1]) for n in lengths]
    labels = [torch.tensor([-100, *row[1:].tolist()]) for row in ids]

    def run(groups, mask):
        def grid(parts):
            rows = [torch.cat([parts[i] for i in group]) for group in groups]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=9)

        inputs = {"input_ids": grid(ids), "labels": grid(labels)}
        if mask:
            inputs["attention_mask"] = (torch.arange(5) < torch.tensor(lengths)[:, None]).long()
            inputs["labels"][inputs["attention_mask"] == 0] = -100
        else:
            inputs["position_ids"] = grid([torch.arange(n) for n in lengths])
        found = columns({1: grid(states)}, grid(logps), inputs)["probe_scores"]
        flat = found[inputs["attention_mask"].bool()] if mask else found.flatten()
        return flat, inputs

    padded, _ = run([[0], [1], [2]], True)
    joined, _ = run([[0, 1, 2]], False)
    torch.testing.assert_close(padded, joined)
    if kind == "row":  # the mean over the answer, its last token, and statistics of its log-probabilities
        answer = slice(1, lengths[0] - 1)
        mean, last = states[0][answer].mean(0), states[0][lengths[0] - 2]
        own = logps[0][answer]
        features = torch.stack([own.mean(), own.min(), torch.tensor(float(own.numel())).log()])
        weight, loss = torch.from_numpy(probe.weights[1]), torch.from_numpy(probe.loss)
        logit = mean @ weight[:, 0] + last @ weight[:, 1] + features @ loss + probe.bias
        torch.testing.assert_close(padded[1 : lengths[0]], -torch.sigmoid(logit).expand(lengths[0] - 1))


def test_a_row_probe_is_fitted_on_judgements_of_whole_rows():
    models = models_of()
    rows = [
        {"prompt": row["prompt"], "completion": row["completion"], "weight": -1.0 if row["spans"] else 1.0}
        for row in judged.rows(60)
    ]
    sample = judged_rows(Dataset.from_list(rows), tiny.tokenizer(), ARGS)
    with models.ready():
        design = design_of(models, sample, SPECIAL)
    fit = fit_probe(design)
    assert design.kind == fit.probe.kind == "row" and design.wrong.size == 60
    assert roc_auc_score(design.wrong, fit.logits) > 0.8
    # the forward pass of scoring gives what the fit saw
    features = design.features(1)
    logits = features @ np.concatenate([*fit.probe.weights[1].T, fit.probe.loss]) + fit.probe.bias
    models.state_columns = fit.probe.state_columns(SPECIAL)
    with models.ready():
        scores = models.score(chunk_of(sample), models.columns)["probe_scores"]
    for row in range(60):
        own = scores[(sample.row == row) & (sample.labels != -100)]
        np.testing.assert_allclose(own, -1 / (1 + np.exp(-logits[row])), atol=1e-4)


def test_too_few_judgements_are_refused():
    models, sample = models_of(), sample_of(3)
    with models.ready():
        design = design_of(models, sample, SPECIAL)
    with pytest.raises(InputError, match=r"wrong tokens in 1 group\(s\) of rows"):
        fit_probe(design)


def test_saved_probes_are_known_by_model_and_tokenizer(fitted, tmp_path):
    models, sample, _, fit = fitted
    model, tokenizer = models.policy_sha256, tokenizer_sha256(tiny.tokenizer())
    fit.probe.facts |= {"model_sha256": model, "tokenizer_sha256": tokenizer, "fitted_rows": row_hashes(sample)}
    save_fit(fit, tmp_path)
    loaded = load_probe(tmp_path, model, tokenizer)
    assert loaded.sha256 == fit.probe.sha256 and loaded.facts["fitted_rows"] == row_hashes(sample)
    again = load_fit(loaded, tmp_path)
    assert np.array_equal(again.logits, fit.logits) and list(again.partial) == [0.5]
    with pytest.raises(InputError, match=r"other weights .*model_sha256"):
        load_probe(tmp_path, models_of(tiny.llama(seed=3)).policy_sha256, tokenizer)
    with pytest.raises(InputError, match="another tokenizer"):
        load_probe(tmp_path, model, "0" * 64)
    (tmp_path / "probe.json").write_text("{")
    with pytest.raises(InputError, match="holds no probe"):
        load_probe(tmp_path, model, tokenizer)


def test_no_state_outlives_its_batch(fitted, monkeypatch):
    """At most the states of one batch are alive while a data set is scored."""
    _, _, _, fit = fitted
    models = models_of(tokens=40)
    columns = fit.probe.state_columns(SPECIAL)
    alive, most = [], 0

    def watched(states, logps, inputs):
        nonlocal most
        alive[:] = [ref for ref in alive if ref() is not None]
        alive.extend(weakref.ref(state) for state in states.values())
        most = max(most, len(alive))
        return columns.columns(states, logps, inputs)

    models.state_columns = type(columns)(columns.names, columns.layers, watched)
    with models.ready():
        models.score(chunk_of(sample_of(40)), models.columns)
    assert most <= 2 * len(columns.layers)
    assert not [ref for ref in alive if ref() is not None]


def probe_folder(models, fit, folder):
    facts = {"model_sha256": models.policy_sha256, "tokenizer_sha256": tokenizer_sha256(tiny.tokenizer())}
    save_probe(Probe(fit.probe.kind, fit.probe.weights, fit.probe.loss, fit.probe.bias, facts), folder)
    return str(folder)


@pytest.mark.parametrize("mode", ["padded", "packed", "padding_free"])
def test_training_by_a_saved_probe_online_and_beforehand(mode, fitted, options, tmp_path):
    models, _, _, fit = fitted
    settings = {
        **options, "score": "probe", "probe": probe_folder(models, fit, tmp_path / "probe"),
        "scoring_cache_dir": str(tmp_path / "cache"), "packing": mode == "packed",
        "padding_free": mode == "padding_free", "max_length": None if mode == "padding_free" else 64,
    }  # fmt: skip

    def make(data=None, **changes):
        return SelectiveSFTTrainer(
            tiny.llama(), SelectiveSFTConfig(**{**settings, **changes}), processing_class=tiny.tokenizer(),
            train_dataset=data if data is not None else judged.data(24, judged=False),
        )  # fmt: skip

    offline, online = make(), make(precompute_scores=False)
    mu = set(tiny.tokenizer()(" mu")["input_ids"])
    negatives = 0
    for ready, raw in zip(offline.get_train_dataloader(), online.get_train_dataloader(), strict=True):
        online._weigher.weigh_batch(raw)
        assert torch.equal(ready["token_weights"], raw["token_weights"])
        found = raw["input_ids"][raw["token_weights"] < 0]
        negatives += found.numel()
        assert set(found.tolist()) <= mu
    assert negatives == 12
    streamed = make(IterableDataset.from_generator(lambda: iter(judged.rows(24, judged=False))))
    assert streamed._online and streamed.train().training_loss > 0


def test_training_needs_a_probe(options):
    with pytest.raises(ValueError, match="score='probe' needs a probe"):
        SelectiveSFTTrainer(
            tiny.llama(), SelectiveSFTConfig(**options, score="probe"), train_dataset=tiny.prompt_data(),
            processing_class=tiny.tokenizer(),
        )  # fmt: skip
