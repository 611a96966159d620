"""Held the wrong way, interrupted or fed nonsense: a clear error or the right result, and nothing lost."""

import logging
import os
import signal
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selsft import DataCollatorForSelectiveSFT
from selsft._compat import SUPPORTED, check_versions
from selsft.data.preparation import truncate_and_pack
from tests.support import tiny
from tests.support.trainers import make

pytestmark = pytest.mark.slow


def losses(run):
    return [row["loss"] for row in run.state.log_history if "grad_norm" in row]


def alternating(index, row):
    return [(-1.0) ** position for position in range(len(row))]


def test_rows_that_are_not_finite_are_named(options, caplog):
    data = tiny.tokenised_data(4, token_weights=alternating)
    token = next(t for t in data[2]["input_ids"] if all(t not in data[i]["input_ids"] for i in (0, 1, 3)))
    model = tiny.llama()
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("inf")
    run = make(options, data, model, max_steps=1, train_sampling_strategy="sequential", logging_nan_inf_filter=False)
    with caplog.at_level(logging.WARNING):
        run.train()
    assert "not finite in its rows [2]" in caplog.text
    assert not np.isfinite(losses(run)[0])


def test_negatives_alone_train(options):
    data = tiny.tokenised_data(8, token_weights=lambda i, row: [-1.0] * len(row))
    for normalization in ("joint", "separate"):
        run = make(
            options, data, forget_normalization=normalization, forget_schedule="constant", protect_special_tokens=False
        )
        run.train()
        assert all(np.isfinite(losses(run))) and losses(run)[0] > 0
        row = run.state.log_history[0]
        assert row["negative_fraction"] == 1 and "positive_loss" not in row


def test_nothing_to_train_on_is_a_loss_of_zero(options):
    data = tiny.tokenised_data(8, token_weights=lambda i, row: [0.0] * len(row))
    run = make(options, data, weight_decay=0.0)
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    run.train()
    assert losses(run) == [0.0] * 3
    assert all(torch.equal(value, before[name]) for name, value in run.model.named_parameters())


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_fractions_at_the_ends(fraction, options, tmp_path):
    run = make(
        options, tiny.prompt_data(), reference=tiny.llama(seed=1), positive_fraction=fraction,
        scoring_cache_dir=str(tmp_path), protect_special_tokens=False,
    )  # fmt: skip
    run.train()
    assert {row["negative_fraction"] for row in run.state.log_history if "grad_norm" in row} == {1.0 - fraction}


@pytest.mark.parametrize("settings", [{}, {"packing": True}, {"padding_free": True, "max_length": None}])
def test_rows_of_one_token(settings, options):
    rows = [[5], [6, 7, 8], [9], [10, 11], [12]]
    data = Dataset.from_dict({"input_ids": rows, "labels": rows, "token_weights": [[-1.0] * len(row) for row in rows]})
    run = make(options, data, max_steps=2, per_device_train_batch_size=5, **settings)
    run.train()
    assert all(np.isfinite(losses(run)))


def test_only_rows_of_one_token(options):
    rows = [[5], [6], [7], [8]]
    data = Dataset.from_dict({"input_ids": rows, "labels": rows, "token_weights": [[1.0]] * 4})
    run = make(options, data, max_steps=1)
    run.train()
    assert losses(run) == [0.0]


def test_rows_with_and_without_weights_are_refused(options):
    data = tiny.tokenised_data(6, token_weights=lambda i, row: None if i == 4 else [1.0] * len(row))
    with pytest.raises(ValueError, match="row 4: column 'token_weights' has nothing for"):
        make(options, data)


@pytest.mark.parametrize(("row", "position"), [(0, 0), (3, 1), (23, 2)])
def test_a_value_that_is_not_finite_names_its_row(row, position, options):
    def weights(index, ids):
        return [None if (index, t) == (row, position) else 1.0 for t in range(len(ids))]

    with pytest.raises(ValueError, match=f"row {row}: column 'token_weights' holds a value that is missing"):
        make(options, tiny.tokenised_data(24, token_weights=weights))


def test_given_weights_score_nothing(options, monkeypatch):
    """Also on a sharded policy: no copy of it is made when there is nothing to score."""
    run = make(options, tiny.tokenised_data(4, token_weights=alternating))
    run._weigher.models.sharded = True
    monkeypatch.setattr("selsft.scoring.frozen.copied", lambda model: pytest.fail("the policy was copied"))
    run._weigher.weigh(run.train_dataset)


def test_constant_scores_are_reported(options, tmp_path, caplog):
    settings = {"score_base_weight": 1.0, "scoring_cache_dir": str(tmp_path)}
    with caplog.at_level(logging.WARNING):
        run = make(options, tiny.prompt_data(), reference=tiny.llama(), **settings)
    assert "the reference says what the model says of every token" in caplog.text
    assert all(weight >= 0 for row in run.train_dataset["token_weights"] for weight in row)


def test_reference_that_is_not_finite_is_refused(options, tmp_path):
    broken = tiny.llama(seed=1)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"score number 0 is nan: a model returned"):
        make(options, tiny.prompt_data(), reference=broken, scoring_cache_dir=str(tmp_path))


SCRIPT = """
import os, sys, time
from datasets import Dataset
from selsft import SelectiveSFTConfig, SelectiveSFTTrainer
from tests.support import tiny
folder, slow_cache = sys.argv[1], sys.argv[2] == "slow"
def replace(source, target, original=os.replace):
    if slow_cache and str(target).endswith(".parquet"):  # between writing a shard and giving it its name
        print("WRITING", flush=True)
        time.sleep(60)
    original(source, target)
os.replace = replace
args = SelectiveSFTConfig(
    folder + "/out", use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", logging_steps=1,
    max_steps=8, save_steps=2, learning_rate=1e-2, negative_threshold=0.1,
    score_base_weight=1.0, score_pooling="token", forget_weight=1.0, disable_tqdm=True,
    per_device_train_batch_size=4, dataloader_pin_memory=False, scoring_cache_dir=folder + "/cache",
)
trainer = SelectiveSFTTrainer(
    tiny.llama(), args, train_dataset=tiny.prompt_data(), processing_class=tiny.tokenizer(),
    reference_model=tiny.llama(seed=1),
)
print("SCORED", flush=True)
from transformers import TrainerCallback
class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        print("STEP", state.global_step, flush=True)
        if sys.argv[2] == "kill":
            time.sleep(0.5)
trainer.add_callback(Slow())
trainer.train(resume_from_checkpoint=sys.argv[3] if len(sys.argv) > 3 else None)
trainer.save_model(folder + "/final")
"""


def run_script(folder, *arguments, kill_at=None):
    """Run the script; `kill_at` is the line of its output at which it is killed with SIGKILL."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), *arguments], stdout=subprocess.PIPE, text=True,
        cwd=os.getcwd(), env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if kill_at and line.strip() == kill_at:
            process.send_signal(signal.SIGKILL)
            break
    process.wait(timeout=120)
    process.stdout.close()
    assert process.returncode == (-signal.SIGKILL if kill_at else 0)


def test_killed_runs_come_to_the_same_end(tmp_path):
    """Killed while the cache is written, started again, killed in training, resumed: the weights are the same."""
    from safetensors.torch import load_file

    peace, trouble = tmp_path / "peace", tmp_path / "trouble"
    run_script(peace, "fast")
    run_script(trouble, "slow", kill_at="WRITING")
    assert not list((trouble / "cache").rglob("*.parquet"))  # nothing has the name of a finished shard
    run_script(trouble, "kill", kill_at="STEP 5")
    checkpoint = trouble / "out" / "checkpoint-4"
    assert checkpoint.is_dir()
    run_script(trouble, "fast", str(checkpoint))
    wanted, found = (load_file(folder / "final" / "model.safetensors") for folder in (peace, trouble))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=name)


# ---- properties


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=12),
    st.sampled_from([None, "bfd", "bfd_split", "wrapped"]),
    st.integers(2, 14),
    st.integers(0, 2**32 - 1),
)
def test_weights_stay_with_their_tokens(lengths, strategy, max_length, seed):
    """Random rows, labels and weights through truncation or packing and the collator: a weight encodes its token."""
    random = np.random.default_rng(seed)
    rows = [random.integers(3, 290, size=length).tolist() for length in lengths]
    data = Dataset.from_dict(
        {
            "input_ids": rows,
            "labels": [[token if random.random() < 0.7 else -100 for token in row] for row in rows],
            "token_weights": [[token * (-1.0) ** token for token in row] for row in rows],
        }
    )
    args = SimpleNamespace(
        max_length=max_length, truncation_mode="keep_start", packing_strategy=strategy, shuffle_dataset=False, seed=0,
        dataset_num_proc=None,
    )  # fmt: skip
    final = truncate_and_pack(data, args, packing=strategy is not None)
    if not len(final):
        return
    padding_free = strategy in ("bfd", "bfd_split")
    batch = DataCollatorForSelectiveSFT(pad_token_id=0, padding_free=padding_free)(list(final))
    trained = batch["labels"] != -100
    expected = batch["input_ids"] * (-1.0) ** batch["input_ids"]
    assert torch.equal(batch["token_weights"], torch.where(trained, expected, 0.0))
    assert sorted(batch["active_rows"].tolist()) == torch.nonzero(trained[:, 1:].flatten()).flatten().tolist()


# ---- versions


def test_versions_outside_the_range_are_refused():
    good = {package: oldest for package, (oldest, _) in SUPPORTED.items()}
    check_versions(good)
    with pytest.raises(ImportError, match=r"trl>=1.16,<1.17, found trl 1.15.2: pip install 'trl>=1.16,<1.17'"):
        check_versions({**good, "trl": "1.15.2"})
    with pytest.raises(ImportError, match=r"found transformers 6.0.0"):
        check_versions({**good, "transformers": "6.0.0"})
    with pytest.raises(ImportError, match=r"selsft needs peft>=0.18, which is not installed"):
        check_versions({package: found for package, found in good.items() if package != "peft"})


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor`:FutureWarning")  # of TRL, about its own loss
def test_settings_are_checked_before_scoring(options, tmp_path):
    """A config that cannot work is refused before a model is scored."""
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        make(options, tiny.prompt_data(), reference=tiny.llama(seed=1), label_smoothing_factor=0.1,
             scoring_cache_dir=str(tmp_path / "c"))  # fmt: skip
    assert not (tmp_path / "c").exists()
