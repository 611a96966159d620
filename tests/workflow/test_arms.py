"""Arms: the same start, rows, order and steps; what differs is what was asked for, and differences are paired."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from peft import LoraConfig
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer

from selsft.errors import InputError
from selsft.evaluation.intervals import paired
from selsft.workflow.arms import compare_arms
from tests.support import tiny

pytestmark = pytest.mark.slow

SETTINGS = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False, "max_steps": 4,
    "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_length": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a start and of a reference."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("start", "reference")):
        tiny.llama(seed=seed).save_pretrained(root / name)
        tiny.tokenizer().save_pretrained(root / name)
    return root


def compare(models, output, arms, **options):
    lines = []
    options = {"settings": SETTINGS, "echo": lines.append, **options}
    held_out = tiny.prompt_data(48).select(range(24, 48))
    found = compare_arms(models / "start", tiny.prompt_data(24), held_out, arms, output, **options)
    return found, [line for line in lines if line.startswith("[") and "skipped" not in line]


def test_arms_are_compared_in_pairs(models, tmp_path):
    scored = {"reference_model": str(models / "reference"), "negative_threshold": 0.0}
    arms = {
        "plain": {},
        "same": {},
        "ignore": {**scored, "forget_weight": 0.0},
        "forget": {**scored, "forget_weight": 1.0},
    }
    start = {"start": models / "start"}
    found, worked = compare(models, tmp_path / "arms", arms, seeds=[3, 4], untrained=start, keep_models=True)
    assert len(worked) == 1 + 2 * 4
    values = {name: each["nll"] for name, each in found.values.items()}
    assert values["plain"].shape == (2, 24) and values["start"].shape == (1, 24)
    np.testing.assert_array_equal(values["plain"], values["same"])  # one start, one order
    assert found.difference("same", "nll") == (0.0, 0.0, 0.0)
    distinct = {name: tuple(each.ravel()) for name, each in values.items() if name != "same"}
    assert len(set(distinct.values())) == 4 and not np.array_equal(*values["plain"])  # seeds order the rows
    forget = found.difference("forget", "nll")
    assert forget == paired(values["plain"], values["forget"]) and forget.low < forget.value < forget.high
    assert forget.value == pytest.approx(found.mean("forget", "nll") - found.mean("plain", "nll"))
    assert f"{forget.value:+.4f} [{forget.low:+.4f}, {forget.high:+.4f}]" in str(found)

    # the plain arm is TRL's own training
    args = SFTConfig(
        output_dir=str(tmp_path / "sft"), seed=3, data_seed=3, report_to="none", save_strategy="no", **SETTINGS
    )
    trainer = SFTTrainer(str(models / "start"), args, train_dataset=tiny.prompt_data(24))
    trainer.train()
    weights = load_file(found.folders["plain"][0] / "model" / "model.safetensors")
    for name, value in trainer.model.state_dict().items():
        if name in weights:
            np.testing.assert_array_equal(weights[name].numpy(), value.numpy())


def test_rows_are_scored_once_for_all_arms_and_seeds(models, tmp_path):
    scored = {"reference_model": str(models / "reference")}
    arms = {"ignore": {**scored, "forget_weight": 0.0}, "forget": scored}

    def stamps():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "scores").iterdir()}

    compare(models, tmp_path, {"ignore": arms["ignore"]})
    before = stamps()
    _, worked = compare(models, tmp_path, arms, seeds=[0, 1])
    assert len(worked) == 3 and stamps().items() >= before.items()
    assert not [path for path in stamps().keys() - before if path.suffix == ".json"]


def test_what_is_done_is_found_again_and_an_arm_more_adds_to_it(models, tmp_path):
    first, worked = compare(models, tmp_path, {"plain": {}})
    assert len(worked) == 1
    again, worked = compare(models, tmp_path, {"plain": {}, "slow": {"learning_rate": 1e-3}}, seeds=[0, 1])
    assert [line.split(":")[0].split()[-1] for line in worked] == ["slow-seed0", "plain-seed1", "slow-seed1"]
    np.testing.assert_array_equal(again.values["plain"]["nll"][:1], first.values["plain"]["nll"])
    _, worked = compare(models, tmp_path, {"plain": {}}, settings={**SETTINGS, "learning_rate": 2e-2})
    assert len(worked) == 1  # another setting is another stage
    manifest = json.loads((tmp_path / "run.json").read_text())
    assert list(manifest["stages"]) == ["plain-seed0"] and manifest["finished"]
    assert not list(tmp_path.rglob("*.safetensors"))  # models go once they are measured


def test_an_arm_reads_the_columns_that_it_chooses(models, tmp_path):
    rows = tiny.prompt_data(16)
    rows = rows.add_column("by_hand", [" wrong" if i % 2 else row for i, row in enumerate(rows["completion"])])
    arms = {"given": {}, "hand": {"columns": {"completion": "by_hand"}}}
    found = compare_arms(models / "start", rows, rows, arms, tmp_path, settings=SETTINGS, echo=lambda line: None)
    assert found.difference("hand", "nll").low > 0  # it has not learnt these completions
    swapped = rows.remove_columns("completion").rename_column("by_hand", "completion")
    other = compare_arms(models / "start", swapped, rows, {"hand": {}}, tmp_path / "b", settings=SETTINGS)
    np.testing.assert_array_equal(found.values["hand"]["nll"], other.values["hand"]["nll"])


def lengths(model, tokenizer, rows, args):
    weight = float(next(model.parameters()).sum())
    return {
        "tokens": [len(tokenizer(text)["input_ids"]) for text in rows["completion"]],
        "weight": [weight] * len(rows),
    }


def test_adapters_own_measures_and_groups(models, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    rows = tiny.prompt_data(12).add_column("question", [i // 3 for i in range(12)])
    options = {"settings": SETTINGS, "peft_config": lora, "group_column": "question", "echo": lambda line: None}
    found = compare_arms(
        models / "start", rows, rows, {"a": {}, "b": {"learning_rate": 0.1}}, tmp_path, measure=lengths, **options
    )
    assert set(found.values["a"]) == {"tokens", "weight"} and found.groups.tolist() == sorted(list(range(4)) * 3)
    assert found.difference("b", "tokens") == (0, 0, 0)
    table = pq.read_table(found.folders["a"][0] / "rows.parquet")
    assert table["tokens"].to_pylist() == found.values["a"]["tokens"][0].tolist()
    again = compare_arms(
        models / "start", rows, rows, {"a": {}, "b": {"learning_rate": 0.1}}, tmp_path, measure=lengths,
        **{**options, "echo": lambda line: pytest.fail(line) if "skipped" not in line else None},
    )  # fmt: skip
    assert again.folders == found.folders


@pytest.mark.parametrize(
    ("arms", "options", "says"),
    [
        ({}, {}, "give at least one of each"),
        ({"a": {}}, {"seeds": [1, 1]}, "each seed once"),
        ({"a b": {}}, {}, "'a b' must be a name of letters"),
        ({"a": {}}, {"untrained": {"a": "start"}}, "'a' must be a name of letters.*given once"),
        ({"a": {}}, {"baseline": "b"}, "baseline='b' is none of the arms: a"),
        ({"a": {"max_steps": 3}}, {}, "'max_steps' of 'a' would change rows, order or steps: move it to settings"),
        ({"a": {}}, {"settings": {"seed": 3}}, "settings: 'seed' is set for each arm"),
        ({"a": {"forget_wieght": 1}}, {}, "unexpected keyword argument 'forget_wieght'"),
        ({"a": {"forget_weight": -1}}, {}, "forget_weight=-1 is outside of"),
        ({"a": {"columns": {"token_weights": "hand"}}}, {}, "column 'hand' of 'a' is not in train_dataset"),
        ({"a": {}}, {"group_column": "nothing"}, "group_column='nothing' is not in eval_dataset"),
        ({"a": {"reference_model": "nowhere"}}, {}, "'nowhere' is neither a folder with a model nor"),
    ],
)
def test_arms_that_cannot_be_compared_are_refused_before_anything_is_trained(models, tmp_path, arms, options, says):
    with pytest.raises(InputError, match=says):
        compare(models, tmp_path / "arms", arms, **options)
    assert not (tmp_path / "arms").exists()


def test_a_measure_needs_a_value_for_each_row(models, tmp_path):
    with pytest.raises(InputError, match=r"measure: 'one' must have a value for each of the 24 rows"):
        compare(models, tmp_path, {"a": {}}, measure=lambda *given: {"one": [1.0]})
