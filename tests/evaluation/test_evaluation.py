"""Evaluation against definitions worked out row by row in float64, and the command around it."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from selsft import SelectiveSFTConfig
from selsft.cli import main
from selsft.evaluation.evaluate import evaluate_rows
from selsft.evaluation.generation import exact_match, greedy_answers
from selsft.evaluation.harness import run_harness
from selsft.evaluation.likelihood import answer_nll, kl_to_base, text_perplexity
from selsft.evaluation.load import load_model
from selsft.evaluation.rows import prepare
from tests.support import tiny

pytestmark = pytest.mark.slow


def adapter(seed=2, **settings):
    torch.manual_seed(seed)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj", "down_proj"], **settings)
    return get_peft_model(tiny.llama(), config)


def arguments(options, **more):
    return SelectiveSFTConfig(**{**options, **more})


@torch.no_grad()
def log_softmax64(model, ids):
    """`(len(ids), V)` float64 log-probabilities of one row, on a float64 copy of what the model computes."""
    training = model.training
    model.eval().double()
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    model.float().train(training)
    return logits.log_softmax(-1)


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("make", [tiny.llama, adapter], ids=["full", "lora"])
@pytest.mark.parametrize("rows", [tiny.prompt_data, tiny.text_data], ids=["pairs", "texts"])
def test_nll_is_that_of_each_row_alone(options, make, rows, padding_free):
    model = make()
    data = rows(11)
    settings = {"max_length": None, "padding_free": True} if padding_free else {}
    held = prepare(model, tiny.tokenizer(), data, arguments(options, **settings))
    found = answer_nll(held, batch_tokens=64)
    for index, (total, count) in enumerate(found):
        row = held.prepared[index]
        ids, labels = row["input_ids"], row["labels"]
        logps = log_softmax64(held.trainer.model, ids)
        trained = [t for t in range(1, len(ids)) if labels[t] != -100]
        expected = -sum(float(logps[t - 1, ids[t]]) for t in trained)
        assert count == len(trained) and trained
        assert total == pytest.approx(expected, abs=2e-5 * count)


def test_prompts_and_references_are_what_training_sees(options):
    tok = tiny.tokenizer()
    data = tiny.prompt_data(6)
    held = prepare(tiny.llama(), tok, data, arguments(options))
    for row, prompt, reference in zip(data, held.prompts, held.references, strict=True):
        assert tok.decode(prompt) == row["prompt"]
        assert reference == [row["completion"].strip()]
    assert all(row["input_ids"][-1] == tok.eos_token_id for row in held.prepared)


def test_the_last_answer_of_a_conversation_is_asked_for(options):
    tok = tiny.tokenizer()
    data = tiny.chat_data(4)
    held = prepare(tiny.llama(), tok, data, arguments(options, max_length=None))
    for row, prompt, reference in zip(data, held.prompts, held.references, strict=True):
        *before, last = row["messages"]
        assert tok.decode(prompt) == tok.apply_chat_template(before, add_generation_prompt=True, tokenize=False)
        assert last["content"] in reference[0]
        assert row["messages"][1]["content"] not in reference[0]


def test_rows_cut_before_their_answer_are_counted_not_scored(options):
    data = Dataset.from_dict(
        {"prompt": [tiny.sentence(1, 12), tiny.sentence(2, 2)], "completion": [" alpha", " beta"]}
    )
    held = prepare(tiny.llama(), tiny.tokenizer(), data, arguments(options, max_length=8))
    assert (held.skipped, held.indices, len(held.prepared)) == (1, [1], 1)
    with pytest.raises(ValueError, match=r"max_length=1 .* leaves no row with a supervised token"):
        prepare(tiny.llama(), tiny.tokenizer(), data, arguments(options, max_length=1))


def test_perplexity_of_blocks(options):
    model, tok = tiny.llama(), tiny.tokenizer()
    texts = [tiny.sentence(i, 9) for i in range(7)]
    found = text_perplexity(model, tok, texts, block=16, batch_size=3)
    ids = tok("\n\n".join(texts), add_special_tokens=False)["input_ids"]
    total, count = 0.0, 0
    for start in range(0, len(ids), 16):
        part = ids[start : start + 16]
        if len(part) > 1:
            logps = log_softmax64(model, part)
            total -= sum(float(logps[t - 1, part[t]]) for t in range(1, len(part)))
            count += len(part) - 1
    assert found["tokens"] == count
    assert found["nats_per_token"] == pytest.approx(total / count, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    covered = sum(len(tok.decode(ids[s + 1 : s + 16]).encode()) for s in range(0, len(ids), 16))
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / covered, rel=1e-4)


def test_kl_to_base_is_the_definition_and_zero_without_a_change():
    model, base = tiny.llama(seed=1), tiny.llama(seed=0)
    rows = [tiny.tokenizer()(tiny.sentence(i, 2 + i))["input_ids"] for i in range(5)]
    found = kl_to_base(model, base, rows, batch_tokens=16)
    for row, value in zip(rows, found, strict=True):
        p, q = log_softmax64(base, row), log_softmax64(model, row)
        assert value == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-6)
        assert value > 1e-3
    assert max(kl_to_base(base, base, rows)) <= 1e-7


def test_kl_of_an_adapter_is_to_its_own_base(options):
    model = adapter()
    model.train()
    data = tiny.prompt_data(5)
    found = evaluate_rows(model, tiny.tokenizer(), data, arguments(options), max_new_tokens=0)
    held = prepare(model, tiny.tokenizer(), data, arguments(options))
    expected = kl_to_base(model, tiny.llama(), held.prompts)
    assert found.metrics["kl_to_base"] == pytest.approx(float(np.mean(expected)), abs=1e-6)
    assert found.metrics["kl_to_base"] > 1e-3
    assert model.active_adapter == "default" and any(p.requires_grad for p in model.parameters())


def test_greedy_answers_are_those_of_one_prompt_at_a_time():
    model, tok = tiny.llama(seed=3), tiny.tokenizer()
    prompts = [tok(tiny.sentence(i, 1 + i % 4))["input_ids"] for i in range(9)]
    said = tok(greedy_answers(model, tok, prompts[:1], max_new_tokens=7)[0].text[-1])["input_ids"][-1]
    with torch.no_grad():  # so that some answers end
        model.lm_head.weight[tok.eos_token_id] = model.lm_head.weight[said] * 1.001
    model.train()
    found = greedy_answers(model, tok, prompts, max_new_tokens=7, batch_tokens=40)
    assert model.training
    model.eval()
    for prompt, answer in zip(prompts, found, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + 7 and tok.eos_token_id not in ids[len(prompt) :]:
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        new = ids[len(prompt) :]
        ended = tok.eos_token_id in new
        kept = new[:-1] if ended else new
        assert (answer.text, answer.ended, answer.tokens) == (
            tok.decode(kept, skip_special_tokens=True).strip(),
            ended,
            len(kept),
        )
    assert {answer.ended for answer in found} == {True, False}


def test_exact_match_takes_any_accepted_answer(options):
    model, tok = tiny.llama(), tiny.tokenizer()
    data = tiny.prompt_data(4)
    answers = greedy_answers(model, tok, [tok(prompt)["input_ids"] for prompt in data["prompt"]], max_new_tokens=4)
    accepted = [["no", answers[0].text], ["no"], [f" {answers[2].text} "], []]
    assert exact_match(answers, accepted) == [True, False, False, False]
    told = data.add_column("answers", accepted)
    found = evaluate_rows(model, tok, told, arguments(options), max_new_tokens=4)
    assert found.rows["exact_match"].to_pylist() == [True, False, True, False]  # outer blanks are dropped
    assert found.metrics["exact_match"] == 0.5


@pytest.fixture
def task(tmp_path):
    """A task file of lm-evaluation-harness on local data."""
    rows = [{"q": tiny.sentence(i, 3), "a": "alpha beta", "b": "gamma delta eta", "gold": i % 2} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(
        f"""task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: ["alpha beta", "gamma delta eta"]
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
    )
    return str(tmp_path / "tasks")


def test_harness_runs_a_task_and_leaves_the_model_as_it_was(task):
    pytest.importorskip("lm_eval")
    model, tok = tiny.llama(), tiny.tokenizer()
    model.train()
    found, documents = run_harness(model, tok, ["local_choice"], include_path=task)
    right = 0
    for i in range(12):
        prompt = tok(tiny.sentence(i, 3))["input_ids"]
        sums = []
        for option in (" alpha beta", " gamma delta eta"):
            whole = tok(tiny.sentence(i, 3) + option)["input_ids"]
            logps = log_softmax64(model, whole)
            sums.append(sum(float(logps[t - 1, whole[t]]) for t in range(len(prompt), len(whole))))
        right += int(np.argmax(sums)) == i % 2
    assert found["local_choice"]["acc"] == pytest.approx(right / 12)
    single = [value for _, _, measure, value in documents if measure == "acc"]
    assert len(single) == 12 and np.mean(single) == pytest.approx(right / 12)
    assert model.training
    with pytest.raises(ValueError, match="lm_eval_tasks='nonsense' is not a task"):
        run_harness(model, tok, ["nonsense"], include_path=task)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A folder with `model`, `adapter`, `rows.jsonl` and `text.txt`, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    tiny.llama().save_pretrained("model")
    tiny.tokenizer().save_pretrained("model")
    model, _ = load_model("model", {})
    torch.manual_seed(0)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"])
    tuned = get_peft_model(model, config)
    tuned.save_pretrained("adapter")
    tiny.prompt_data(10).to_json("rows.jsonl")
    (tmp_path / "text.txt").write_text("\n\n".join(tiny.sentence(i, 8) for i in range(20)))
    return tmp_path


FLAGS = ["--use_cpu", "--bf16", "false", "--report_to", "none", "--dataset_name", "rows.jsonl"]


def test_command_saves_means_and_rows(saved, capsys):
    status = main(
        ["evaluate", *FLAGS, "--model_name_or_path", "adapter", "--evaluation_dir", "found", "--max_new_tokens", "3",
         "--neutral_text", "text.txt", "--neutral_block", "32", "--eval_rows", "6"]
    )  # fmt: skip
    assert status == 0, capsys.readouterr().err
    metrics = json.loads((saved / "found" / "metrics.json").read_text())
    rows = pq.read_table(saved / "found" / "rows.parquet").to_pydict()
    assert len(rows["row"]) == metrics["rows"] == 6
    assert metrics["nll"] == pytest.approx(sum(rows["nll"]) / sum(rows["tokens"]))
    assert metrics["kl_to_base"] == pytest.approx(np.mean(rows["kl_to_base"])) and metrics["kl_to_base"] > 0
    assert metrics["eos_rate"] == pytest.approx(np.mean(rows["ended"]))
    assert metrics["text_perplexity"] > 1 and metrics["text_tokens"] > 50
    record = json.loads((saved / "found" / "selsft_run.json").read_text())
    assert record["command"] == "evaluate" and "torch" in record["versions"]
    assert main(["evaluate", *FLAGS, "--model_name_or_path", "adapter", "--evaluation_dir", "found"]) == 2
    assert "evaluation_dir='found' exists and is not empty, nothing was overwritten" in capsys.readouterr().err


def test_command_scores_options(saved, capsys):
    rows = [
        {"id": f"q{i}", "prompt": tiny.sentence(i, 3), "options": ["alpha", "beta gamma", "mu"], "gold": i % 3}
        for i in range(9)
    ]
    (saved / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--use_cpu", "--bf16", "false", "--model_name_or_path", "model", "--options_file", "choices.jsonl"]
    assert main(["evaluate", *flags, "--evaluation_dir", "found"]) == 0, capsys.readouterr().err
    metrics = json.loads((saved / "found" / "metrics.json").read_text())
    table = pq.read_table(saved / "found" / "options.parquet").to_pydict()
    model, tok = tiny.llama(), tiny.tokenizer()
    right = 0
    for row in rows:
        i = table["example_id"].index(row["id"]) // 3
        prompt = tok(row["prompt"])["input_ids"]
        sums = []
        for option in row["options"]:
            whole = tok(f"{row['prompt']} {option}")["input_ids"]
            logps = log_softmax64(model, whole)
            sums.append(sum(float(logps[t - 1, whole[t]]) for t in range(len(prompt), len(whole))))
        assert table["logprob"][3 * i : 3 * i + 3] == pytest.approx(sums, abs=1e-4)
        assert table["is_gold"][3 * i : 3 * i + 3] == [option == row["gold"] for option in range(3)]
        right += int(np.argmax(sums)) == row["gold"]
    assert sorted(table["example_id"][::3]) == [row["id"] for row in rows]
    assert (metrics["options"], metrics["options_acc"]) == (9, pytest.approx(right / 9))
    (saved / "choices.jsonl").write_text('{"id": "a", "prompt": "b", "options": ["c", "d"], "gold": 2}\n')
    assert main(["evaluate", *flags, "--evaluation_dir", "other"]) == 2
    assert "choices.jsonl, line 1: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_path", "model", "--max_new_tokens", "-1"], "max_new_tokens=-1 must be at least 0"),
        (["--model_name_or_path", "model", "--eval_rows", "0"], "eval_rows=0 must be at least 1"),
        (["--model_name_or_path", "model", "--neutral_text", "no.txt"], "neutral_text='no.txt': no such file"),
        (["--model_name_or_path", "model", "--num_processes", "2"], "evaluation runs in one process"),
        (["--model_name_or_path", "nothing-here"], "nothing-here"),
        ([], "model_name_or_path is missing"),
    ],
)
def test_bad_input_is_one_line(saved, capsys, flags, message):
    assert main(["evaluate", *FLAGS, "--evaluation_dir", "found", *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("selsft evaluate: error: ") and message in error
    assert not (saved / "found").exists()


def test_an_adapter_whose_base_has_moved(saved, capsys):
    (saved / "model").rename(saved / "moved")
    flags = [*FLAGS, "--model_name_or_path", "adapter", "--evaluation_dir", "found", "--max_new_tokens", "0"]
    assert main(["evaluate", *flags]) == 2
    assert "give --base_model_name_or_path" in capsys.readouterr().err
    assert main(["evaluate", *flags, "--base_model_name_or_path", "moved"]) == 0
