"""arXiv 2508.04329 as published, without the defects of its published code: each test shows one of them absent.

The runs use `PAPER_2508_04329` on tiny models. What the published code does is said in each docstring.
"""

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import selsft.training.head
from selsft import PAPER_2508_04329
from tests.support import tiny, trainers
from tests.support.oracle import expected_loss, plain_logps

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:forget_objective='gradient_ascent'")]
EOS = 1


def make(options, data=None, reference=True, model=None, **changes):
    rule = {} if reference else {"positive_fraction": None}  # given weights leave a rule nothing to do
    settings = {"train_sampling_strategy": "sequential", **PAPER_2508_04329, **rule, **changes}
    return trainers.make(options, data, model, tiny.llama(seed=1) if reference else None, **settings)


@pytest.fixture
def paper(options, tmp_path):
    return {**options, "scoring_cache_dir": str(tmp_path / "cache"), "optim": "sgd", "learning_rate": 0.1}


def steps(trainer):
    return [row for row in trainer.state.log_history if "grad_norm" in row]


@pytest.fixture
def trained(monkeypatch):
    """What reaches the loss: one list of (targets, weights) of the predicted tokens for each micro-batch."""
    seen, original = [], selsft.training.head.linear_selective_cross_entropy

    def recorded(hidden, weight, targets, token_weights, **keywords):
        rows = keywords["active_rows"]
        listed = torch.zeros(targets.numel(), dtype=torch.bool)
        listed[rows] = True
        if len(weight) > 3:  # the toy head, which proves that weights count, has three
            seen.append((targets.clone(), token_weights.clone() * listed.view(targets.shape)))
        return original(hidden, weight, targets, token_weights, **keywords)

    monkeypatch.setattr(selsft.training.head, "linear_selective_cross_entropy", recorded)
    return seen


@pytest.mark.parametrize("size", [4, 1])
def test_the_last_token_of_every_row_is_trained(size, paper, trained):
    """Published (finetune.py:71): the loop stops one short, so the EOS of the longest row of a micro-batch is in
    neither set, and with one row per micro-batch EOS is never trained."""
    run = make(paper, per_device_train_batch_size=size, max_steps=24 // size)
    run.train()
    rows = [row for targets, weights in trained for row in zip(targets, weights, strict=True)]
    assert len(rows) == 24 and len({int((targets != -100).sum()) for targets, _ in rows}) > 3
    for targets, weights in rows:
        (ends,) = torch.nonzero(targets == EOS, as_tuple=True)
        assert len(ends) == 1 and weights[ends[0]] != 0
        assert ((weights != 0) == (targets != -100)).all()  # and so is every other token: no neutral one, none lost


def test_lambda_is_one_ramp_over_all_epochs(paper):
    """Published (finetune.py:870): made of the micro-step within the epoch over the steps of the whole run, so that it
    starts again with every epoch and ends at 0.25 / epochs."""
    settings = {key: value for key, value in paper.items() if key != "max_steps"}
    run = make(settings, num_train_epochs=3, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    run.train()
    found = [row["forget_weight"] for row in steps(run)]
    assert len(found) == 9 and found == pytest.approx([0.25 * step / 9 for step in range(9)])
    assert found == sorted(found)


def test_lambda_goes_on_after_a_resume(paper, tmp_path):
    """Published: restarts at 0."""
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make(paper, **changes)
    whole.train()
    resumed = make(paper, **{**changes, "output_dir": str(tmp_path / "resumed")})
    resumed.train(resume_from_checkpoint=paper["output_dir"] + "/checkpoint-2")
    later = [row["forget_weight"] for row in steps(resumed) if row["step"] > 2]
    assert later == [row["forget_weight"] for row in steps(whole)[2:]] == pytest.approx([0.125, 0.1875])


def test_lambda_ends_at_its_final_weight(paper):
    """Published: 0.25 / epochs. Here step t of T has 0.25 t / T: what would follow the last step is 0.25."""
    run = make(paper, max_steps=5)
    run.train()
    assert steps(run)[-1]["forget_weight"] == pytest.approx(0.25 * 4 / 5)
    assert selsft.trainer.forget_weight_at(5, 5, 0.25, "linear") == 0.25


def test_the_loss_is_normalised_over_the_optimizer_step(paper):
    """Published (finetune.py:872): each term is divided by the counts of its own micro-batch, so that one negative
    beside many positives weighs a hundredfold, and another batch size is another loss."""
    found = []
    for size in (8, 4, 2, 1):
        run = make(
            paper, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, forget_schedule="constant"
        )
        rows = list(run.train_dataset)[:8]
        counts = [sum(w < 0 for w in row["token_weights"]) / sum(w > 0 for w in row["token_weights"]) for row in rows]
        run.train()
        found.append([(row["loss"], row["grad_norm"]) for row in steps(run)])
    assert max(counts) > 2 * min(counts)  # per micro-batch it would be another number
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=2e-5)
    assert found[0][0][0] == pytest.approx(
        expected_loss(tiny.llama(), rows, "gradient_ascent", "separate", 0.25), rel=1e-5
    )


def test_a_conversation_may_start_with_the_assistant(paper):
    """Published (finetune.py:73): the first token marks position -1, which is the last one of the row."""
    ids = [[7, 8, 9, 10, 11, EOS], [12, 13, 14, EOS]]
    data = Dataset.from_dict(
        {
            "input_ids": ids,
            "labels": ids,
            "token_weights": [[-1.0, 1.0, 1.0, -1.0, 1.0, 1.0], [-1.0, 1.0, -1.0, 1.0]],
        }
    )
    changes = {"per_device_train_batch_size": 2, "max_steps": 1, "forget_schedule": "constant"}
    run = make(paper, data, reference=False, **changes)
    run.train()
    rows = list(data)
    assert steps(run)[0]["loss"] == pytest.approx(
        expected_loss(tiny.llama(), rows, "gradient_ascent", "separate", 0.25), rel=1e-5
    )
    assert steps(run)[0]["negative_fraction"] == pytest.approx(2 / 8)  # the two first tokens are predicted by nothing


def test_scores_of_a_conversation_that_starts_with_the_assistant(paper):
    """Rendered by a chat template: the first turn is scored and trained, each token with its own score."""
    turns = [("assistant", "alpha beta"), ("user", "gamma"), ("assistant", "delta epsilon")]
    messages = [{"role": role, "content": text} for role, text in turns]
    data = Dataset.from_dict({"messages": [messages] * 4})
    run = make(paper, data, assistant_only_loss=True, max_length=64)
    row = run.train_dataset[0]
    trained = np.array(row["labels"]) != -100
    starts = np.flatnonzero(np.diff(trained.astype(int)) == 1) + 1
    assert len(starts) == 2 and starts[0] < 12 and (np.array(row["token_weights"])[trained] != 0).all()
    for column, model in (("base_logps", tiny.llama()), ("ref_logps", tiny.llama(seed=1))):
        wanted = np.where(trained, plain_logps(model, row["input_ids"]), 0.0)
        np.testing.assert_allclose(row[column], wanted, atol=2e-5)


@pytest.mark.parametrize("column", ["base_logps", "ref_logps"])
def test_scores_of_another_length_are_refused(column, options):
    """Published (token_partitioning.py:184): zip cuts the longer one in silence."""

    def values(short):
        return lambda index, row: [-1.0] * (len(row) - (short and index == 5))

    columns = {name: values(name == column) for name in ("base_logps", "ref_logps")}
    with pytest.raises(ValueError, match=f"row 5: column '{column}' has .* values for .* tokens"):
        make(options, tiny.tokenised_data(**columns), reference=False)


def test_the_share_is_exact_and_ranked_over_the_whole_pool(paper):
    """Published: int() of both shares may leave a token in neither set. Here each is in one, best scores first."""
    run = make(paper)
    weights, scores, rows = [], [], []
    for index, row in enumerate(run.train_dataset):
        trained = np.array(row["labels"]) != -100
        weights += np.array(row["token_weights"])[trained].tolist()
        scores += (np.float32(row["ref_logps"]) - np.float32(row["base_logps"]))[trained].tolist()
        rows += [index] * int(trained.sum())
    weights, scores, rows = np.array(weights), np.array(scores), np.array(rows)
    assert (weights > 0).sum() == int(0.7 * len(weights) + 1e-9) and (weights < 0).sum() == (weights != 1).sum()
    assert scores[weights > 0].min() > scores[weights < 0].max()
    shares = [np.mean(weights[rows == index] > 0) for index in range(24)]
    assert max(shares) - min(shares) > 0.2  # not 70 % of each row


@pytest.mark.parametrize("normalization", ["separate", "joint"])
def test_lambda_zero_is_ignoring_exactly(normalization, paper):
    """The arm "Ignoring" of the paper: negatives have no label. Bit for bit the same weights after three steps."""
    run = make(paper, forget_weight=0.0, forget_normalization=normalization)
    weights = run.train_dataset["token_weights"]
    kept = [
        [label if weight > 0 else -100 for label, weight in zip(labels, row, strict=True)]
        for labels, row in zip(run.train_dataset["labels"], weights, strict=True)
    ]
    ignored = Dataset.from_dict({"input_ids": run.train_dataset["input_ids"], "labels": kept})
    ones = ignored.add_column("token_weights", [[1.0] * len(row) for row in kept])
    same = make(paper, ones, reference=False)
    arguments = SFTConfig(**{**paper_free(paper), "train_sampling_strategy": "sequential"})
    plain = SFTTrainer(tiny.llama(), arguments, train_dataset=ignored, processing_class=tiny.tokenizer())
    for trainer in (run, same, plain):
        trainer.train()
    dropped = sum(label == -100 for row in kept for label in row) - 3 * len(kept)
    assert dropped > 20
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, same.model.state_dict()[name]), name
        torch.testing.assert_close(value, plain.model.state_dict()[name], rtol=1e-5, atol=1e-6, msg=name)
    assert not torch.equal(run.model.lm_head.weight, tiny.llama().lm_head.weight)


def paper_free(settings):
    return {key: value for key, value in settings.items() if key != "scoring_cache_dir"}
