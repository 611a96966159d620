"""The model card: what was selected, from what, with what result, and no `None`."""

import re
from pathlib import Path

import pytest

from selsft import SelectiveSFTConfig, SelectiveSFTTrainer
from selsft.training.card import complete, describe, public_name, results
from tests.support import tiny


def write(options, tmp_path, data=None, **changes):
    """The card of a run, by heading of its table."""
    tiny.llama().save_pretrained(tmp_path / "my-base")
    tiny.tokenizer().save_pretrained(tmp_path / "my-base")
    args = SelectiveSFTConfig(**{**options, **changes})
    trainer = SelectiveSFTTrainer(str(tmp_path / "my-base"), args, train_dataset=data or tiny.prompt_data())
    trainer.train()
    trainer.create_model_card(model_name="mine", dataset_name="me/data")
    text = Path(options["output_dir"], "README.md").read_text(encoding="utf-8")
    assert "None" not in text and str(tmp_path) not in text and "fine-tuned version of `my-base`" in text
    return text, dict(re.findall(r"^\| (\w[^|]*) \| (.*) \|$", text, re.MULTILINE))


def test_a_run_with_a_reference(options, tmp_path):
    tiny.llama(seed=1).save_pretrained(tmp_path / "clean-reference")
    tiny.tokenizer().save_pretrained(tmp_path / "clean-reference")
    reference = str(tmp_path / "clean-reference")
    text, lines = write(options, tmp_path, reference_model=reference, negative_threshold=0.1, score_base_weight=0.5)
    assert lines["Score"] == "`influence`, pooled by word_sum, score_base_weight 0.5"
    assert lines["Rule"] == "negative below a score of -0.1" and lines["Reference"] == "clean-reference"
    assert lines["Negative tokens"] == "forgotten with `unlikelihood` (weight 0.25, linear, joint)"
    share = float(re.match(r"([\d.]+)% of the trained tokens", lines["Share of negatives"]).group(1))
    assert 5 < share < 95
    assert lines["Data"] == "24 rows of me/data" and "last loss of negative tokens" in lines["Results"]
    assert "2508.04329" in text


def test_a_run_without_selection_credits_no_paper(options, tmp_path):
    text, lines = write(options, tmp_path)
    assert "2508.04329" not in text and "SelectiveSFT" not in text and "trained with SFT" in text
    assert set(lines) == {"Data", "Results"}


def test_weights_of_the_data(options, tmp_path):
    data = tiny.tokenised_data(token_weights=lambda index, row: [-1.0 if i % 4 == 3 else 1.0 for i in range(len(row))])
    _, lines = write(options, tmp_path, data, forget_weight=0.0)
    assert lines["Selection"] == "by the column `token_weights` or marks of the data"
    assert lines["Negative tokens"] == "ignored" and "Reference" not in lines and "Score" not in lines


@pytest.mark.parametrize(
    "changes, rule",
    [
        ({"score": "surprisal"}, "the best 95% positive (global)"),
        ({"score": "probe"}, "negative below a score of -0.5"),
        ({"positive_fraction": 0.7}, "the best 70% positive (global)"),
    ],
)
def test_rules(changes, rule):
    assert describe(SelectiveSFTConfig("out", use_cpu=True, bf16=False, **changes), "", "")["Rule"] == rule


def test_parts(tmp_path):
    assert (
        public_name("org/model") == "org/model" and public_name(tmp_path) == tmp_path.name and public_name(None) == ""
    )
    assert results([]) == {}
    found = results([{"negative_fraction": 0.1}, {"negative_fraction": 0.3}, {"eval_loss": 2.0}, {"eval_loss": 1.5}])
    assert found == {"Share of negatives": "20.00% of the trained tokens", "Results": "eval loss 1.5"}
    path = tmp_path / "README.md"
    path.write_text("no headings")
    complete(path, "a", "b", {"x": "1|2"})
    assert path.read_text().endswith("| x | 1\\|2 |\n\n")
