"""Spans, corrections, weights and train flags of every form reach the tokens that they speak of, and no other."""

import json

import numpy as np
import pytest
from datasets import Dataset, IterableDataset, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from selsft import SelectiveSFTConfig, SelectiveSFTTrainer
from selsft.data.alignment import Alignment
from selsft.data.preparation import read_token_marks
from selsft.data.spans import has_marks, join_parts
from tests.data.test_preparation import MODES
from tests.support import tiny, tokenizers
from tests.support.characters import weights_of

TEXT = "The quick café 😀👍🏽 שלום doesn't stop, e\u0301te\u0301 1234!"


def tokenised(name, row):
    """The row as TRL tokenises it, with what was tokenised."""
    tokenizer = tokenizers.family(name)
    messages = row.get("messages") or (row["prompt"] + row["completion"] if isinstance(row.get("prompt"), list) else 0)
    if messages:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    else:
        text = row["text"] if "text" in row else row["prompt"] + row["completion"]
        ids = tokenizer(text)["input_ids"]
    return tokenizer, text, ids


def found_weights(name, row, number=0):
    tokenizer, text, ids = tokenised(name, row)
    tokens = read_token_marks({**row, "input_ids": ids}, number, tokenizer, Alignment(tokenizer), None, "text")
    return tokenizer, text, ids, tokens.weights


def check(name, row, spans, text_of_spans, default=1.0):
    """`spans` are characters of `text_of_spans`, which stands once in what is tokenised."""
    tokenizer, text, ids, weights = found_weights(name, row)
    assert text.count(text_of_spans) == 1
    base = text.index(text_of_spans)
    shifted = [(base + start, base + end, weight) for start, end, weight in spans]
    expected = weights_of(tokenizer, ids, text, shifted, name, default)
    np.testing.assert_array_equal(weights, expected)
    assert (weights != default).any() == any(weight != default for *_, weight in spans)


SPANS = [(4, 9, -1.0), (10, 14, -0.25), (15, 16, 0.0), (17, 18, -2.0), (19, 23, 0.5), (24, 31, -1.0), (39, 40, -1.0)]


@pytest.mark.parametrize("name", tokenizers.NAMES)
class TestForms:
    text = TEXT

    def known(self, name):
        """What the family's tokenizer can decode."""
        if name == "unigram":
            text = "The quick lazy dog doesn't stop, and jumps over"
            return text, [(4, 9, -1.0), (9, 12, -0.25), (15, 18, 0.0), (20, 27, 0.5)]
        return TEXT, SPANS

    def test_text(self, name):
        text, spans = self.known(name)
        check(name, {"text": text, "spans": spans}, spans, text)

    def test_completion(self, name):
        text, spans = self.known(name)
        check(name, {"prompt": "What?\n", "completion": text, "spans": spans}, spans, text)

    def test_message(self, name):
        text, spans = self.known(name)
        messages = [
            {"role": "user", "content": "stop, " + text[:4]},
            {"role": "assistant", "content": text, "spans": spans},
            {"role": "user", "content": "fox"},
            {"role": "assistant", "content": "dog", "spans": [[0, 3, 0.75]]},
        ]
        tokenizer, rendered, ids, weights = found_weights(name, {"messages": messages})
        base = rendered.index(text)
        last = rendered.rindex("dog")
        shifted = [(base + s, base + e, w) for s, e, w in spans] + [(last, last + 3, 0.75)]
        np.testing.assert_array_equal(weights, weights_of(tokenizer, ids, rendered, shifted, name))

    def test_completion_of_one_message(self, name):
        text, spans = self.known(name)
        row = {
            "prompt": [{"role": "user", "content": "What?"}],
            "completion": [{"role": "assistant", "content": text}],
            "spans": spans,
        }
        check(name, row, spans, text)

    def test_a_template_that_trims(self, name):
        """Llama 3 and Gemma trim messages, ChatML does not."""
        content = "  quick fox \n"
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": content, "spans": [[0, 7]]}]
        tokenizer, rendered, ids, weights = found_weights(name, {"messages": messages})
        kept = content if content in rendered else content.strip()
        base = rendered.index(kept)
        spans = [(base, rendered.index("quick") + 5, -1.0)]
        np.testing.assert_array_equal(weights, weights_of(tokenizer, ids, rendered, spans, name))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([name for name in tokenizers.NAMES if name != "unigram"]))
def test_any_spans_of_any_messages(data, name):
    pieces = ["The", " quick", "\n", " ", "café", "e\u0301", "😀", "👩‍👩‍👧", "שלום", "x"]
    contents = data.draw(
        st.lists(st.lists(st.sampled_from(pieces), min_size=1, max_size=6).map("".join), min_size=2, max_size=4)
    )
    contents = ["<" + content + ">" for content in contents]
    messages, expected = [], []
    for turn, content in enumerate(contents):
        cut = st.integers(0, len(content))
        weight = st.sampled_from([-1.0, -0.5, 0.0, 2.0])
        spans = [
            [min(a, b), max(a, b), w]
            for a, b, w in data.draw(st.lists(st.tuples(cut, cut, weight), max_size=3))
            if a != b
        ]
        messages.append({"role": ("user", "assistant")[turn % 2], "content": content, "spans": spans or None})
        expected.append(spans)
    tokenizer, rendered, ids, weights = found_weights(name, {"messages": messages})
    start, shifted = 0, []
    for content, spans in zip(contents, expected, strict=True):
        base = rendered.index(content, start)
        shifted += [(base + a, base + b, w) for a, b, w in spans]
        start = base + len(content)
    np.testing.assert_array_equal(weights, weights_of(tokenizer, ids, rendered, shifted, name))


def marked_text(row, below=0.0, name="qwen"):
    """What the tokens with a weight below `below` say."""
    tokenizer, _, ids, weights = found_weights(name, row)
    return tokenizer.decode([token for token, weight in zip(ids, weights, strict=True) if weight < below])


def test_inner_marks_win():
    """Span over part over message over row; within a layer the lowest."""
    text = "one two three four"
    row = {"text": text, "weight": -0.5, "spans": [[4, 7, 1.0], [8, 18, -1.0], [14, 18, 0.0]]}
    tokenizer, rendered, ids, weights = found_weights("qwen", row)
    expected = weights_of(tokenizer, ids, text, [(4, 7, 1.0), (8, 18, -1.0)], "qwen", default=-0.5)
    np.testing.assert_array_equal(weights, expected)

    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": text, "weight": -0.25, "spans": [[4, 7, 1.0]]},
    ]
    tokenizer, rendered, ids, weights = found_weights("qwen", {"messages": messages, "weight": 0.5})
    base, end = rendered.index(text), len(rendered)
    expected = weights_of(tokenizer, ids, rendered, [(base, end, -0.25)], "qwen", default=0.5)
    expected = np.where(weights_of(tokenizer, ids, rendered, [(base + 4, base + 7, -9)], "qwen") == -9, 1.0, expected)
    np.testing.assert_array_equal(weights, expected)


def test_a_token_over_the_border_belongs_to_the_span():
    tokenizer, text, ids, weights = found_weights("llama3", {"text": "The quick", "spans": [[5, 6]]})
    assert tokenizer.decode([token for token, weight in zip(ids, weights, strict=True) if weight < 0]) in (
        " qu", " quick", " q", "qu", "q"
    )  # fmt: skip
    np.testing.assert_array_equal(weights, weights_of(tokenizer, ids, text, [(5, 6, -1.0)], "llama3"))


def test_weight_of_a_row_fills_its_completion():
    tokenizer, text, ids, weights = found_weights("qwen", {"prompt": "What? ", "completion": "dogs", "weight": -0.5})
    np.testing.assert_array_equal(weights, weights_of(tokenizer, ids, text, [(6, 10, -0.5)], "qwen"))
    _, _, _, weights = found_weights("llama3", {"text": "quick", "weight": -0.5})
    assert weights.tolist() == [1.0] + [-0.5] * (len(weights) - 1)  # BOS is no part of the text


def test_train_detail_of_axolotl():
    """Its end is inclusive; what it does not train, or does not mention, is unknown."""
    content = "I'm doing very well, thank you!"
    details = [
        {"begin_offset": 0, "end_offset": 8, "train": False},
        {"begin_offset": 9, "end_offset": 18, "train": True},
        {"begin_offset": 19, "end_offset": 24, "train": False},
    ]
    row = {
        "messages": [
            {"role": "user", "content": "How?"},
            {"role": "assistant", "content": content, "train_detail": details},
        ]
    }
    check("qwen", row, [(0, 9, 0.0), (19, 31, 0.0)], content)


def test_train_of_a_message():
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two", "train": False}]
    _, _, _, weights = found_weights("qwen", {"messages": messages})
    assert set(weights) == {0.0, 1.0}
    messages[1]["train"] = True
    assert set(found_weights("qwen", {"messages": messages})[3]) == {1.0}


def test_corrections_become_spans():
    row = {"prompt": "Write.", "completion": "He go to school", "corrected": "He goes to school"}
    assert marked_text(row).strip() == "go"


ROWS = 24


def span_row(i):
    words = tiny.sentence(i, 4 + i % 5)
    first = words.index(" ") + 1
    return words, ([[first, first + 3, -0.5], [len(words) - 2, len(words)]] if i % 3 else [] if i % 2 else None)


def dataset_of(form):
    rows = []
    for i in range(ROWS):
        words, spans = span_row(i)
        ask = tiny.sentence(i + 1, 3)
        if form == "text":
            rows.append({"text": words, "spans": spans})
        elif form == "completion":
            rows.append(
                {
                    "prompt": ask,
                    "completion": " " + words,
                    "spans": spans and [[s + 1, e + 1, *w] for s, e, *w in spans],
                }
            )
        else:
            answer = {"role": "assistant", "content": words, "spans": spans}
            user = {"role": "user", "content": ask, "spans": None}
            if form == "messages":
                rows.append({"messages": [user, answer]})
            elif form == "parts":
                cut = words.index(" ")
                parts = [{"type": "text", "text": words[:cut], "spans": None, "weight": None}]
                shifted = spans and [[s - cut, e - cut, *w] for s, e, *w in spans]
                parts.append({"type": "text", "text": words[cut:], "spans": shifted, "weight": None})
                question = [{"type": "text", "text": ask, "spans": None, "weight": None}]
                rows.append(
                    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": parts}]}
                )
            else:
                rows.append({"prompt": [user], "completion": [answer]})
    return Dataset.from_list(rows)


def oracle_dataset(form):
    """The same rows tokenised, with the weights of the oracle."""
    tokenizer = tiny.tokenizer()
    columns = {"input_ids": [], "labels": [], "token_weights": []}
    special = {tokenizer.convert_tokens_to_ids(token) for token in ("<eos>", "<|im_end|>", "<|im_start|>", "<pad>")}
    for i in range(ROWS):
        words, spans = span_row(i)
        ask, masked = tiny.sentence(i + 1, 3), 0
        if form in ("text", "completion"):
            text = words + "<eos>" if form == "text" else ask + " " + words + "<eos>"
            masked = len(tokenizer(ask)["input_ids"]) if form == "completion" else 0
        else:
            turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": words}]
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            if form == "conversation":
                asked = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
                masked = len(tokenizer(asked)["input_ids"])
        ids = tokenizer(text)["input_ids"]
        base = text.rindex(words)
        shifted = [(base + s, base + e, w[0] if w else -1.0) for s, e, *w in spans or []]
        weights = weights_of(tokenizer, ids, text, shifted)
        weights = [max(w, 0.0) if token in special else w for token, w in zip(ids, weights.tolist(), strict=True)]
        columns["input_ids"].append(ids)
        columns["labels"].append([-100] * masked + ids[masked:])
        columns["token_weights"].append(weights)
    return Dataset.from_dict(columns)


def trained(options, data, **changes):
    lora = changes.pop("lora", False)
    run = SelectiveSFTTrainer(
        model=tiny.llama(),
        args=SelectiveSFTConfig(**{**options, "max_steps": 2, "forget_schedule": "constant", **changes}),
        train_dataset=data,
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if lora else None,
    )
    run.train()
    return run


def assert_same_run(run, other):
    assert [row["loss"] for row in run.state.log_history if "loss" in row] == [
        row["loss"] for row in other.state.log_history if "loss" in row
    ]
    for (name, mine), (_, theirs) in zip(run.model.named_parameters(), other.model.named_parameters(), strict=True):
        assert (mine == theirs).all(), name
    assert sum(row.get("negative_fraction", 0) for row in run.state.log_history) > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("form", "streamed"),
    [("completion", False), ("messages", False), ("messages", True)],
    ids=["completion", "messages", "streamed"],
)
def test_a_run_with_spans_is_the_run_with_the_weights_of_the_oracle(form, mode, streamed, options):
    changes = {"max_length": 40, **MODES[mode]}
    if changes["max_length"] == 7:  # cuts through spans
        changes["max_length"] = {"completion": 14, "messages": 32}[form]
    runs = []
    for data in (dataset_of(form), oracle_dataset(form)):
        runs.append(trained(options, data.to_iterable_dataset() if streamed else data, **changes))
    if not streamed:
        for name in ("input_ids", "labels", "token_weights"):
            assert runs[0].train_dataset[name][:] == runs[1].train_dataset[name][:], name
    assert_same_run(*runs)


@pytest.mark.parametrize("form", ["text", "conversation", "parts"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_other_forms_run_likewise(form, lora, options):
    other = oracle_dataset("messages" if form == "parts" else form)
    assert_same_run(trained(options, dataset_of(form), lora=lora), trained(options, other, lora=lora))


def test_rows_without_spans_are_positive(options):
    """Beside rows with spans; an empty list says the same for training."""
    run = trained(options, dataset_of("text"))
    for i, row in enumerate(run.train_dataset):
        if not span_row(i)[1]:
            assert set(row["token_weights"]) == {1.0}
        else:
            assert min(row["token_weights"]) == -1


def test_special_tokens_are_never_negative(options):
    data = Dataset.from_list([{"prompt": "alpha", "completion": " beta", "weight": -1.0}] * 8)
    run = trained(options, data)
    eos = tiny.tokenizer().eos_token_id
    for row in run.train_dataset:
        assert row["input_ids"][-1] == eos and row["token_weights"][-1] == 0
        assert row["token_weights"][-2] == -1


def write(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("streamed", [False, True], ids=["loaded", "streamed"])
def test_marks_that_come_late_are_seen(streamed, tmp_path, options):
    """Keys that only some messages have are stored as JSON, of which the first row says nothing."""
    plain = {"messages": [{"role": "user", "content": "alpha"}, {"role": "assistant", "content": "beta gamma"}]}
    marked = json.loads(json.dumps(plain))
    marked["messages"][1]["spans"] = [[5, 10]]
    parts = json.loads(json.dumps(plain))
    parts["messages"][1]["content"] = [
        {"type": "text", "text": "beta", "train": True}, {"type": "text", "text": " gamma", "train": False}
    ]  # fmt: skip
    data = load_dataset(
        "json", data_files=write(tmp_path, [plain] * 20 + [marked] * 2 + [parts] * 2), split="train",
        streaming=streamed, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    run = SelectiveSFTTrainer(
        tiny.llama(), SelectiveSFTConfig(**options), train_dataset=data, processing_class=tiny.tokenizer()
    )
    rows = list(run.train_dataset)
    tokenizer = tiny.tokenizer()
    gamma = [
        tokenizer.decode(
            [token for token, weight in zip(row["input_ids"], row["token_weights"], strict=True) if weight < 1]
        )
        for row in rows
    ]
    assert [text.strip() for text in gamma] == [""] * 20 + ["gamma"] * 4
    assert [min(row["token_weights"]) for row in rows] == [1.0] * 20 + [-1.0] * 2 + [0.0] * 2


@pytest.mark.parametrize("streamed", [False, True], ids=["loaded", "streamed"])
def test_axolotls_own_form(streamed, tmp_path, options):
    """`conversations` of `from` and `value`, with the keys that its documentation shows."""
    row = {
        "conversations": [
            {"from": "system", "value": "alpha", "train": False},
            {"from": "human", "value": "beta", "train": True},
            {
                "from": "assistant",
                "value": "gamma delta eta",
                "train_detail": [
                    {"begin_offset": 0, "end_offset": 4, "train": True},
                    {"begin_offset": 5, "end_offset": 10, "train": False},
                    {"begin_offset": 11, "end_offset": 14, "train": True},
                ],
            },
        ]
    }
    data = load_dataset(
        "json", data_files=write(tmp_path, [row] * 8), split="train", streaming=streamed,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    run = SelectiveSFTTrainer(
        tiny.llama(), SelectiveSFTConfig(**{**options, "max_length": 64}), train_dataset=data,
        processing_class=tiny.tokenizer(),
    )  # fmt: skip
    row = next(iter(run.train_dataset))
    unknown = [t for t, weight in zip(row["input_ids"], row["token_weights"], strict=True) if weight == 0]
    assert tiny.tokenizer().decode(unknown) == "<|im_start|>system\nalpha<|im_end|> delta"
    assert set(row["token_weights"]) == {0.0, 1.0}


def test_parts_of_the_reasoning(options):
    parts = [{"type": "text", "text": "beta", "train": False}, {"type": "text", "text": " gamma", "train": True}]
    answer = {
        "role": "assistant",
        "reasoning_content": parts,
        "content": [{"type": "text", "text": "delta", "train": True}],
    }
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{% if m.reasoning_content %}{{ m.reasoning_content }};{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}"
    )
    run = SelectiveSFTTrainer(
        tiny.llama(), SelectiveSFTConfig(**options), train_dataset=Dataset.from_list([{"messages": [answer]}] * 4),
        processing_class=tokenizer,
    )  # fmt: skip
    for row in run.train_dataset:
        unknown = [t for t, weight in zip(row["input_ids"], row["token_weights"], strict=True) if weight == 0]
        assert tokenizer.decode(unknown) == "beta"


def test_spans_win_over_their_part(options):
    parts = [
        {"type": "text", "text": "alpha beta", "weight": -1.0, "spans": [[6, 10, 0.5]]},
        {"type": "text", "text": " gamma", "weight": None, "spans": None},
    ]
    data = Dataset.from_list([{"messages": [{"role": "assistant", "content": parts}]}] * 4)
    run = SelectiveSFTTrainer(
        tiny.llama(), SelectiveSFTConfig(**options), train_dataset=data, processing_class=tiny.tokenizer()
    )
    row = run.train_dataset[0]
    text = tiny.tokenizer().decode(row["input_ids"])
    base = text.index("alpha")
    expected = weights_of(
        tiny.tokenizer(), row["input_ids"], text, [(base, base + 6, -1.0), (base + 6, base + 10, 0.5)]
    )
    over = weights_of(tiny.tokenizer(), row["input_ids"], text, [(base + 6, base + 10, 0.5)])
    np.testing.assert_array_equal(row["token_weights"], np.where(over == 0.5, 0.5, expected))
    assert min(row["token_weights"]) == -1


def test_eos_is_no_part_of_the_text(options):
    data = Dataset.from_list([{"prompt": "alpha", "completion": " beta", "spans": [[1, 6]]}])
    refused(options, data, r"row 0: span \[1, 6\] is outside the text, which has 5 characters")


def test_text_about_marks_is_no_mark(tmp_path):
    messages = [
        {"role": "user", "content": 'a key is "spans": [[0, 1]]'},
        {"role": "assistant", "content": "x", "name": "y"},
    ]
    data = load_dataset(
        "json", data_files=write(tmp_path, [{"messages": messages}]), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert not has_marks(data)
    messages[1]["train"] = False
    (tmp_path / "other").mkdir()
    data = load_dataset(
        "json", data_files=write(tmp_path / "other", [{"messages": messages}]), split="train",
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    assert has_marks(data)


BAD = {
    "not a list": ({"spans": "0-3"}, r"row 1: spans='0-3' must be a list"),
    "form": ({"spans": [[0, 3, -1, 2]]}, r"row 1: span \[0, 3, -1, 2\] has another form"),
    "fraction": ({"spans": [[0.5, 3]]}, r"row 1: span \[0.5, 3\]: 0.5 is not a whole number"),
    "empty": ({"spans": [[3, 3]]}, r"row 1: span \[3, 3\] is empty"),
    "reversed": ({"spans": [[4, 3]]}, r"row 1: span \[4, 3\] is empty"),
    "negative": ({"spans": [[-1, 3]]}, r"row 1: span \[-1, 3\] is outside the text, which has 10 characters"),
    "outside": ({"spans": [[0, 11]]}, r"row 1: span \[0, 11\] is outside the text, which has 10 characters"),
    "nan": ({"spans": [[0, 3, float("nan")]]}, r"row 1: span \[0, 3, nan\]: weight nan must be a finite number"),
    "kind": ({"spans": [[0, 3, "R:NOUN"]]}, r"weight 'R:NOUN' must be a finite number"),
    "boolean": ({"spans": [[0, 3, True]]}, r"weight True must be a finite number"),
    "both": ({"spans": [], "corrected": "x"}, r"row 1 has 'spans' and 'corrected'"),
    "no correction": ({"corrected": []}, r"row 1: corrected=\[\] must be a text or a list of texts"),
    "empty correction": ({"corrected": ["a", ""]}, r"row 1: corrected=\['a', ''\] must be"),
    "weight": ({"weight": "bad"}, r"weight='bad' of row 1 must be a finite number"),
    "infinite weight": ({"weight": float("inf")}, r"weight=inf of row 1 must be a finite number"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_marks_are_refused_by_row_and_value(case):
    mark, message = BAD[case]
    with pytest.raises(ValueError, match=message) as error:
        found_weights("qwen", {"text": "alpha beta", **mark}, number=1)
    assert "\n" not in str(error.value)


BAD_MESSAGES = {
    "two": ({"spans": [], "train_detail": []}, r"row 0: message 1 has 'spans' and 'train_detail'"),
    "weight and train": ({"weight": 1, "train": True}, r"message 1 has weight=1 and train=True"),
    "train": ({"train": "no"}, r"message 1: train='no' must be true or false"),
    "detail": ({"train_detail": [{"begin_offset": 0, "train": True}]}, r"message 1: train_detail .* has another form"),
    "detail outside": (
        {"train_detail": [{"begin_offset": 0, "end_offset": 4, "train": True}]},
        r"message 1: train_detail .* is outside the text, which has 4 characters",
    ),
    "trimmed": (
        {"content": "beta  ", "spans": [[4, 6]]},
        r"row 0: the span of the characters 4 to 6 overlaps no token",
    ),
}


@pytest.mark.parametrize("case", BAD_MESSAGES)
def test_wrong_marks_of_messages_are_refused(case):
    mark, message = BAD_MESSAGES[case]
    messages = [{"role": "user", "content": "alpha"}, {"role": "assistant", "content": "beta", **mark}]
    with pytest.raises(ValueError, match=message):
        found_weights("llama3", {"messages": messages})


def test_spans_beside_several_messages_are_refused():
    messages = [{"role": "user", "content": "alpha"}, {"role": "assistant", "content": "beta"}]
    with pytest.raises(ValueError, match=r"row 0 has 'spans' beside a conversation, which does not say in which"):
        found_weights("qwen", {"messages": messages, "spans": [[0, 2]]})
    row = {"prompt": messages[:1], "completion": [{**messages[1], "spans": [[0, 1]]}], "spans": [[0, 2]]}
    with pytest.raises(ValueError, match=r"row 0 has 'spans', and its completion has marks of its own"):
        found_weights("qwen", row)


def test_a_template_that_drops_the_span_is_refused():
    tokenizer = tokenizers.family("qwen")
    template = tokenizer.chat_template.replace("m['content']", "m['content'].split('</think>')[-1]")
    tokenizer.chat_template = template
    messages = [{"role": "assistant", "content": "<think>wrong</think>right", "spans": [[7, 12]]}]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    row = {"messages": messages, "input_ids": ids}
    with pytest.raises(ValueError, match=r"row 2: the chat template leaves out or repeats the characters"):
        read_token_marks(row, 2, tokenizer, Alignment(tokenizer), None, "text")
    messages[0]["spans"] = [[20, 25]]
    tokens = read_token_marks(row, 2, tokenizer, Alignment(tokenizer), None, "text")
    assert tokenizer.decode([token for token, w in zip(ids, tokens.weights, strict=True) if w < 0]) == "right"


def refused(options, data, match, **arguments):
    settings_ = {key: arguments.pop(key) for key in ("reference_model", "score") if key in arguments}
    with pytest.raises(ValueError, match=match):
        SelectiveSFTTrainer(
            tiny.llama(), SelectiveSFTConfig(**options, **settings_), train_dataset=data,
            processing_class=tiny.tokenizer(), **arguments,
        )  # fmt: skip


def test_two_sources_of_weights_are_refused(options):
    data = dataset_of("text")
    refused(options, data, "has the column 'spans', and a reference_model is set", reference_model="base")
    refused(options, data, "has the column 'spans', and formatting_func", formatting_func=lambda row: row["text"])
    twice = data.add_column("token_weights", [[1.0]] * ROWS)
    refused(options, twice, "has the column 'spans', and the column 'token_weights' too")
    images = data.add_column("image", ["x"] * ROWS)
    refused(options, images, "has the column 'spans', and images")
    tokenised_rows = tiny.tokenised_data(4).add_column("spans", [[[0, 1]]] * 4)
    refused(options, tokenised_rows, "the column 'spans', which speaks of a text, and tokenised rows")
    refused(options, dataset_of("messages"), "spans or weights, and a reference_model", reference_model="base")


def test_parts_with_spans_of_the_message_are_refused(options):
    parts = [{"type": "text", "text": "beta", "train": False}]
    data = Dataset.from_list([{"messages": [{"role": "assistant", "content": parts, "spans": [[0, 2]]}]}])
    refused(options, data, "row 0: message 0 has 'spans' and a list of content parts")
    image = [{"type": "image", "text": None, "train": False}]
    data = Dataset.from_list([{"messages": [{"role": "assistant", "content": image}]}])
    refused(options, data, r"row 0: message 0, part 0 is no text \(type='image'\)")


def test_parts_without_marks_are_left_to_the_template(options):
    """Nothing about such rows is ours."""
    parts = [{"type": "text", "text": "beta"}]
    data = Dataset.from_list([{"messages": [{"role": "assistant", "content": parts}]}])
    assert not has_marks(data) and join_parts(data) is data


def test_streams_without_features(options):
    def rows():
        for i in range(ROWS):
            words, spans = span_row(i)
            yield {"text": words, "spans": spans}

    run = trained(options, IterableDataset.from_generator(rows))
    assert run.state.log_history[0]["negative_fraction"] > 0.05


@pytest.mark.parametrize("form", ["text", "messages", "parts"])
@pytest.mark.parametrize("marks_before", [False, True])
def test_marks_too_late_in_a_stream_are_refused(form, marks_before, options):
    """A row that would be read without its marks stops the run."""

    def row(marked):
        if form == "text":
            return {"text": "alpha beta", **({"spans": [[0, 5]]} if marked else {})}
        content = [{"type": "text", "text": "beta", "weight": -1.0}] if marked and form == "parts" else "beta"
        spans = {"spans": [[0, 2]]} if marked and form == "messages" else {}
        return {"messages": [{"role": "user", "content": "alpha"}, {"role": "assistant", "content": content, **spans}]}

    def rows():
        first = row(False)
        if marks_before and form != "text":
            first["messages"][1]["weight"] = 0.5
        elif marks_before:
            first["weight"] = 0.5
        yield first
        yield from (row(False) for _ in range(300))
        yield from (row(True) for _ in range(300))

    data = IterableDataset.from_generator(rows)
    run = SelectiveSFTTrainer(
        tiny.llama(), SelectiveSFTConfig(**options), train_dataset=data, processing_class=tiny.tokenizer()
    )
    if marks_before and form != "parts":  # then every row is read
        assert min(min(row["token_weights"]) for row in run.train_dataset) == -1
    else:
        with pytest.raises(ValueError, match=r"row 301.* after 256 rows without: declare the features"):
            list(run.train_dataset)


def test_several_processes_prepare_alike(options):
    one, two = (
        SelectiveSFTTrainer(
            tiny.llama(), SelectiveSFTConfig(**options, dataset_num_proc=number), train_dataset=dataset_of("messages"),
            processing_class=tiny.tokenizer(),
        )
        for number in (None, 2)
    )  # fmt: skip
    assert one.train_dataset["token_weights"][:] == two.train_dataset["token_weights"][:]
