"""Readers and preparation: what comes in, what is left out and counted, and what every draw depends on."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from selsft.evaluation.examples import MultipleChoiceExample
from selsft.skills.readers import read_bigbench, read_jsonl, read_lm_eval
from selsft.skills.suite import AREAS, SUITE, load_task, suite, task_names
from selsft.skills.tasks import SkillTask, TaskSettings, arrange, fixed_labels, normalize, prepare, split_by_group

GOOD = {"id": "1", "prompt": "p", "options": ["a", "b"], "gold": 1, "split": "train"}


def write(path: Path, rows) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows))
    return path


def questions(count: int, split: str, options=None, prompt="{split} question {i}") -> list[MultipleChoiceExample]:
    made = []
    for i in range(count):
        texts = options or tuple(f"{split} {i} {word}" for word in ("one", "two", "three"))
        made.append(
            MultipleChoiceExample(f"{split}{i}", prompt.format(split=split, i=i), tuple(texts), i % len(texts), split)
        )
    return made


def task(train=None, test=None, name="t") -> SkillTask:
    return SkillTask(
        name, questions(30, "train") if train is None else train, questions(20, "test") if test is None else test
    )


# JSONL


def test_jsonl_rows_become_examples(tmp_path):
    rows = [
        {**GOOD, "prompt": "a \u2028 b\u0085c"},  # white space that is no line end in JSONL
        "",
        {**GOOD, "id": "2", "split": "test", "group": "g", "delimiter": "\n", "options": ["x", "y", "z"], "gold": 2},
    ]
    found = read_jsonl(write(tmp_path / "name.jsonl", rows))
    assert found.name == "name" and len(found.train) == len(found.test) == 1
    assert found.train[0] == MultipleChoiceExample("1", "a \u2028 b\u0085c", ("a", "b"), 1, "train")
    assert found.test[0] == MultipleChoiceExample("2", "p", ("x", "y", "z"), 2, "test", "g", "\n")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "Expecting property name"),
        ("[1]", "must be a JSON object"),
        ({**GOOD, "gold": 2}, "gold=2"),
        ({**GOOD, "gold": "1"}, "gold='1'"),
        ({**GOOD, "gold": True}, "gold=True"),
        ({**GOOD, "options": "ab"}, "options='ab'"),
        ({**GOOD, "options": ["a", 1]}, "options="),
        ({**GOOD, "options": ["a"]}, "options has 1"),
        ({**GOOD, "prompt": None}, "prompt=None"),
        ({**GOOD, "split": "dev"}, "split='dev'"),
        ({key: value for key, value in GOOD.items() if key != "gold"}, "missing 'gold'"),
        ({**GOOD, "id": "0"}, "also in line 1"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(tmp_path, row, says):
    path = write(tmp_path / "bad.jsonl", [{**GOOD, "id": "0"}, "", row])
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 3: ") as caught:
        read_jsonl(path)
    assert says in str(caught.value)


def test_a_file_with_and_without_splits_is_refused_and_one_without_is_split_by_group(tmp_path):
    bare = {key: value for key, value in GOOD.items() if key != "split"}
    with pytest.raises(ValueError, match="1 of 2 rows have a 'split'"):
        read_jsonl(write(tmp_path / "half.jsonl", [GOOD, {**bare, "id": "2"}]))
    with pytest.raises(ValueError, match="no rows"):
        read_jsonl(write(tmp_path / "empty.jsonl", [""]))
    rows = [{**bare, "id": f"{i}", "prompt": f"p{i}", "group": f"g{i // 4}"} for i in range(40)]
    found = read_jsonl(write(tmp_path / "grouped.jsonl", rows), test_fraction=0.3, seed=1)
    sides = {split: {e.group for e in found.split(split)} for split in ("train", "test")}
    assert len(sides["test"]) == 3 and not sides["train"] & sides["test"]
    assert len(found.train) + len(found.test) == 40
    again = read_jsonl(write(tmp_path / "grouped.jsonl", rows[::-1]), test_fraction=0.3, seed=1)
    assert {e.id for e in again.test} == {e.id for e in found.test}
    assert {e.id for e in read_jsonl(tmp_path / "grouped.jsonl", None, 0.3, 2).test} != {e.id for e in found.test}


def test_prompts_stay_together_without_groups():
    same = [MultipleChoiceExample(str(i), f"Prompt  {i // 3}", ("a", f"b{i}"), 0) for i in range(30)]
    split = split_by_group(same, 0.4, 0)
    sides = [{normalize(e.prompt) for e in split if e.split == side} for side in ("train", "test")]
    assert not sides[0] & sides[1] and len(sides[1]) == 4


# BIG-bench


def test_bigbench_files(tmp_path):
    rows = [{"input": f"q{i}", "target_scores": {"yes": i % 2, "no": 1 - i % 2, "maybe": 0}} for i in range(10)]
    rows += [{"input": "tie", "target_scores": {"a": 1, "b": 1}}, {"input": "one", "target_scores": {"a": 1}}]
    folder = tmp_path / "navigate"
    folder.mkdir()
    content = {"canary": "canary GUID 26b5c67b", "task_prefix": "Say.", "examples": rows}
    found = read_bigbench(write(folder / "task.json", [content]))
    assert found.name == "navigate" and found.dropped == {"no single best option": 2}
    assert found.source["canary"] == "canary GUID 26b5c67b"
    examples = found.train + found.test
    assert len(examples) == 10 and len(found.test) == 4
    first = next(e for e in examples if e.id == "navigate-1")
    assert (first.prompt, first.options, first.gold) == ("Say.\nQ: q1\nA:", ("yes", "no", "maybe"), 0)
    assert not any("canary" in e.prompt for e in examples)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not JSON"),
        ({"examples": []}, "no 'examples'"),
        ({"examples": [{"input": "q", "target": "t"}]}, r"examples\[0\] lacks"),
        ({"examples": [{"input": "q", "target_scores": {"a": 1, "b": 1}}]}, "none of the 1 examples"),
    ],
)
def test_other_files_are_no_bigbench_tasks(tmp_path, content, says):
    with pytest.raises(ValueError, match=says):
        read_bigbench(write(tmp_path / "task.json", [content]))


# lm-evaluation-harness


def harness_task(**changes):
    rows = {
        split: [{"q": f"{split} {i}", "choices": ["x", "y y", "z"], "answer": i % 3} for i in range(6)]
        for split in ("train", "validation", "test")
    }
    made = {
        "task": "local",
        "custom_dataset": lambda **_: DatasetDict({s: Dataset.from_list(r) for s, r in rows.items()}),
        "training_split": "train",
        "validation_split": "validation",
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{q}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
    }
    return {key: value for key, value in {**made, **changes}.items() if value is not None}


@pytest.fixture(scope="module")
def manager():
    tasks = pytest.importorskip("lm_eval.tasks")
    return tasks.TaskManager(include_defaults=False)


def test_harness_tasks_keep_their_prompts_and_splits(manager):
    found = read_lm_eval(harness_task(), task_manager=manager)
    assert found.name == "local" and len(found.train) == len(found.test) == 6
    second = found.test[1]
    assert (second.prompt, second.options, second.gold) == ("Question: test 1\nAnswer:", ("x", "y y", "z"), 1)
    assert {e.prompt.split()[1] for e in found.train} == {"train"} and not found.source["own_split"]
    validated = read_lm_eval(harness_task(test_split=None), task_manager=manager)
    assert {e.prompt.split()[1] for e in validated.test} == {"validation"}
    alone = read_lm_eval(harness_task(training_split=None, validation_split=None), 0.5, task_manager=manager)
    assert alone.source["own_split"] and len(alone.train) == len(alone.test) == 3
    text = read_lm_eval(harness_task(doc_to_target="{{choices[answer]}}"), task_manager=manager)
    assert [e.gold for e in text.train] == [e.gold for e in found.train]


def test_harness_tasks_with_options_in_the_prompt_are_turned_around(manager):
    rows = [{"s": "Ann told Bob that _ was late.", "o1": "Ann", "o2": "Bobby", "answer": 1}] * 4

    def contexts(doc):
        return [doc["s"].split("_")[0] + doc[name] for name in ("o1", "o2")]

    made = harness_task(
        custom_dataset=lambda **_: DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows)),
        validation_split=None,
        doc_to_text=lambda doc: doc["answer"],
        doc_to_choice=contexts,
        doc_to_target=lambda doc: doc["s"].split("_")[1].strip(),
    )
    example = read_lm_eval(made, task_manager=manager).test[0]
    assert example.prompt == "Ann told Bob that"
    assert (example.options, example.gold) == (("Ann was late.", "Bobby was late."), 1)


def test_harness_tasks_that_cannot_be_used_are_refused(manager, monkeypatch):
    with pytest.raises(ValueError, match="output_type='generate_until'"):
        made = harness_task(output_type="generate_until", doc_to_choice=None, doc_to_target="{{answer}}")
        read_lm_eval(made, task_manager=manager)
    with pytest.raises(ValueError, match=r"'no_such_task'.*could not be loaded.*tasks_dir"):
        read_lm_eval("no_such_task", task_manager=manager)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(ValueError, match="OFFLINE is set"):
        read_lm_eval("no_such_task", task_manager=manager)


def test_without_the_extra_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ImportError, match=r"pip install 'selsft\[lm-eval\]'"):
        read_lm_eval("arc_easy")


# The suite


def test_the_suite_has_21_tasks_in_five_areas():
    entries = suite()
    assert len(entries) == len({e.name for e in entries}) == len({e.lm_eval for e in entries}) == 21
    assert {e.area for e in entries} == set(AREAS) and len(AREAS) == 5
    assert sum(e.confirmed for e in entries) == 11
    assert task_names(f"x,{SUITE}, x,piqa") == ["x", *(e.name for e in entries)]


def test_the_suite_names_tasks_that_the_harness_has():
    tasks = pytest.importorskip("lm_eval.tasks")
    root = Path(tasks.__file__).parent
    folders = ("arc", "piqa", "siqa", "commonsense_qa", "openbookqa", "hellaswag", "winogrande", "super_glue", "sciq")
    files = [file for name in (*folders, "glue", "mathqa", "toxigen") for file in (root / name).rglob("*.yaml")]
    text = "\n".join(file.read_text() for file in files)
    names = {line.split(":", 1)[1].strip().strip("\"'") for line in text.splitlines() if line.startswith("task:")}
    assert {e.lm_eval for e in suite()} <= names


@pytest.mark.parametrize("text", ["", " , ", "a/b", "../x"])
def test_invalid_task_names_are_refused(text):
    with pytest.raises(ValueError, match=r"no task is named|is not the name of a task"):
        task_names(text)


def test_tasks_are_found_by_name_in_a_folder(tmp_path):
    write(tmp_path / "sst2.jsonl", [GOOD, {**GOOD, "id": "2", "split": "test"}])
    (tmp_path / "big").mkdir()
    rows = [{"input": f"q{i}", "target_scores": {"a": 1, "b": 0}} for i in range(4)]
    write(tmp_path / "big" / "task.json", [{"examples": rows}])
    assert load_task("sst2", tmp_path).area == "language understanding"
    assert load_task("big", tmp_path).name == "big"
    with pytest.raises(ValueError, match=r"'piqa' is not in tasks_dir=.*it has sst2"):
        load_task("piqa", tmp_path)


# Preparation


def test_everything_that_is_lost_is_counted():
    train = questions(10, "train")
    train += [
        MultipleChoiceExample("coincide", "q", ("Same ", "same"), 0, "train"),
        MultipleChoiceExample("twice", "TRAIN  question 0", train[0].options[::-1], 2, "train"),
        MultipleChoiceExample("left", "disputed", ("x", "y"), 0, "train"),
        MultipleChoiceExample("right", "disputed", ("x", "y"), 1, "train"),
        MultipleChoiceExample(
            "leak", "Test question 3", tuple(f"test 3 {w}" for w in ("two", "one", "three")), 1, "train"
        ),
        MultipleChoiceExample("near", "other", ("x", "y"), 1, "train", group="passage"),
        MultipleChoiceExample("same options elsewhere", "Test question 3", ("x", "y"), 1, "train"),
    ]
    test = [*questions(6, "test"), MultipleChoiceExample("far", "another", ("x", "y"), 1, "test", group="passage")]
    found = prepare(task(train, test), TaskSettings(max_train=8))
    assert found.dropped == {
        "options coincide": 1,
        "repeated question": 1,
        "same question, different answers": 2,
        "train question in test": 1,
        "train group in test": 1,
        "beyond the size": 3,
    }
    assert len(found.train) == 8 and len(found.test) == 7
    assert not {"coincide", "twice", "left", "right", "leak", "near"} & {e.id for e in found.train}
    with pytest.raises(ValueError, match="train example 'leak' overlaps with test"):
        prepare(task(train, test), TaskSettings(strict=True))


def test_two_options_are_gold_and_a_distractor_in_any_place():
    found = prepare(task(questions(300, "train")), TaskSettings())
    before = {e.id: e for e in questions(300, "train")}
    places, distractors = Counter(), Counter()
    for example in found.train:
        old = before[example.id]
        assert example.options[example.gold] == old.options[old.gold]
        (other,) = set(example.options) - {old.options[old.gold]}
        distractors[(old.options.index(other) - old.gold) % 3] += 1
        places[example.gold] += 1
    for counts in (places, distractors):  # 300 fair throws: 4.6 standard deviations
        assert set(counts) in ({0, 1}, {1, 2}) and all(110 < number < 190 for number in counts.values())
    whole = prepare(task(), TaskSettings(options="all"))
    assert {len(e.options) for e in whole.train} == {3}
    assert all(sorted(e.options) == sorted(before[e.id].options) for e in whole.train)
    assert [e.options for e in whole.train] != [before[e.id].options for e in whole.train]


def test_draws_of_an_example_depend_on_the_seed_and_its_id_alone():
    examples = questions(50, "train")
    alone = [arrange(example, "binary", 0) for example in examples]
    assert [arrange(example, "binary", 0) for example in examples[::-1]][::-1] == alone
    assert [arrange(example, "binary", 1) for example in examples] != alone
    # a fixed value: the same on every machine and in every version
    assert arrange(examples[7], "binary", 0).options == alone[7].options == ("train 7 one", "train 7 two")


def test_sizes_are_seeded_draws():
    found = [prepare(task(), TaskSettings(max_train=10, max_test=5, seed=seed)) for seed in (0, 0, 1)]
    assert [len(t.train) for t in found] == [10] * 3 and [len(t.test) for t in found] == [5] * 3
    assert found[0].fingerprint() == found[1].fingerprint() != found[2].fingerprint()
    assert {e.id for e in found[0].train} != {e.id for e in found[2].train}


def test_fixed_labels_are_balanced():
    rows = [
        MultipleChoiceExample(f"{split}{i}", f"{split} {i}", ("no", "yes"), int(i % 5 > 0), split)
        for split in ("train", "test")
        for i in range(50)
    ]
    made = task([e for e in rows if e.split == "train"], [e for e in rows if e.split == "test"])
    assert fixed_labels(made.train) == ("no", "yes") and fixed_labels(questions(30, "train")) is None
    found = prepare(made, TaskSettings())
    assert Counter(e.options[e.gold] for e in found.train) == {"no": 10, "yes": 10}
    assert found.dropped == {"balance of the labels": 60}
    assert {e.options for e in found.train} == {("no", "yes"), ("yes", "no")}
    free = prepare(made, TaskSettings(balance=False))
    assert Counter(e.options[e.gold] for e in free.train) == {"no": 10, "yes": 40} and not free.dropped
    never = task([e for e in made.train if e.gold == 1], made.test)
    with pytest.raises(ValueError, match=r"no train rows left of 40.*balance=False"):
        prepare(never, TaskSettings())


@pytest.mark.parametrize(("field", "value"), [("options", "three"), ("max_train", 1), ("max_test", 0)])
def test_meaningless_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field}="):
        TaskSettings(**{field: value})
