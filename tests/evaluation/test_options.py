"""The option scorer against lm-evaluation-harness 0.4.13, and against full logits where the harness is no measure."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerFast

from selsft.evaluation.examples import (
    MultipleChoiceExample,
    encode_pair,
    move_spaces,
    training_data,
    training_row,
)
from selsft.evaluation.options import OptionScores, score_options
from selsft.trainer import SelectiveSFTConfig, SelectiveSFTTrainer
from tests.support import tiny

DOCUMENTS = 120
BATCHES = (1, 5, 64)
HARNESS_NAMES = {"none": "acc", "chars": "acc_norm", "bytes": "acc_bytes"}


def documents(count: int = DOCUMENTS, seed: int = 0) -> list[MultipleChoiceExample]:
    """Questions of all lengths; 2 to 4 options of several tokens, some of which begin alike."""
    rng = random.Random(seed)
    made = []
    for index in range(count):
        stem = " ".join(rng.choices(tiny.WORDS, k=rng.randint(1, 40)))
        options: list[str] = []
        size = rng.randint(2, 4)
        while len(options) < size:
            start = options[0].split()[:1] if options and rng.random() < 0.3 else []
            text = " ".join([*start, *rng.choices(["naïve", "日本", "ответ", *tiny.WORDS], k=rng.randint(1, 5))])
            if text not in options:
                options.append(text)
        tail = rng.choice(["\nAnswer:", "", "  ", "\n"])
        made.append(MultipleChoiceExample(f"d{index}", f"Q: {stem}{tail}", tuple(options), rng.randrange(size)))
    return made


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = tiny.llama(0, max_position_embeddings=512)
    for parameter in made.parameters():  # far from uniform, so that an error shows in the sums
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.fixture(scope="module")
def harness(model):
    """Summed log-probabilities and hits of the harness itself, from a task that it builds and runs."""
    simple_evaluate = pytest.importorskip("lm_eval").simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = [{"id": e.id, "prompt": e.prompt, "options": list(e.options), "gold": e.gold} for e in documents()]

    def run(batch_size: int):
        task = {
            "task": "local",
            "custom_dataset": lambda **_: DatasetDict(test=Dataset.from_list(rows)),
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "gold",
            "metric_list": [{"metric": name, "aggregation": "mean"} for name in HARNESS_NAMES.values()],
        }
        found = simple_evaluate(
            HFLM(model, tokenizer=tiny.tokenizer(), batch_size=batch_size),
            tasks=[task],
            task_manager=TaskManager(include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )
        samples = sorted(found["samples"]["local"], key=lambda sample: sample["doc_id"])
        assert [sample["doc"]["id"] for sample in samples] == [row["id"] for row in rows]
        sums = np.array([float(answer[0]) for sample in samples for answer in sample["filtered_resps"]])
        hits = {name: np.array([sample[name] for sample in samples]) for name in HARNESS_NAMES.values()}
        return SimpleNamespace(sums=sums, hits=hits)

    return run(7)


def scored(model, **options) -> OptionScores:
    return score_options(model, tiny.tokenizer(), documents(), progress=False, **options)


@pytest.mark.parametrize("batch_size", BATCHES)
def test_sums_and_accuracies_are_those_of_the_harness(model, harness, batch_size):
    found = scored(model, batch_size=batch_size)
    assert (found.n_tokens > 1).mean() > 0.9
    assert np.abs(found.logprob - harness.sums).max() <= 1e-4
    for normalization, name in HARNESS_NAMES.items():  # question by question, not only on average
        assert (found.predictions(normalization) == found.gold).tolist() == harness.hits[name].tolist(), name
        assert found.accuracy(normalization) == harness.hits[name].mean()
    predicted = {tuple(found.predictions(normalization)) for normalization in ("none", "chars", "bytes", "tokens")}
    assert len(predicted) == 4  # so many different measures


def test_a_wrong_span_or_other_weights_would_be_noticed(model, harness):
    tokenizer, examples = tiny.tokenizer(), documents()
    shifted = []
    for example in examples:
        for option in range(len(example.options)):
            context, continuation = encode_pair(tokenizer, example.prompt, example.completion(option))
            logps = model(torch.tensor([context + continuation])).logits.log_softmax(-1)[0]
            targets = torch.tensor(continuation)
            start = len(context)  # one position late: the state that has seen the token already
            shifted.append(logps[range(start, start + len(targets)), targets].sum().item())
    assert np.abs(np.array(shifted) - harness.sums).max() > 1.0
    other = tiny.llama(0, max_position_embeddings=512)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[0] += 0.1
    assert np.abs(scored(other).logprob - harness.sums).max() > 1e-2


def test_long_prompts_lose_their_start_as_in_the_harness(model):
    HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
    examples = documents(20)
    lm = HFLM(model, tokenizer=tiny.tokenizer(), batch_size=4, max_length=64)
    pairs = [(e.prompt, e.completion(i)) for e in examples for i in range(len(e.options))]
    expected = np.array(
        [float(v) for v, _ in lm.loglikelihood([SimpleNamespace(args=p) for p in pairs], disable_tqdm=True)]
    )
    found = score_options(model, tiny.tokenizer(), examples, max_length=64, progress=False)
    assert np.abs(found.logprob - expected).max() <= 1e-4
    whole = score_options(model, tiny.tokenizer(), examples, progress=False)
    assert np.abs(found.logprob - whole.logprob).max() > 1e-2


@pytest.mark.parametrize("add_bos", [False, True])
def test_beginnings_are_treated_as_in_the_harness(model, add_bos):
    HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    if add_bos:
        from tokenizers import processors

        backend = tokenizer.backend_tokenizer
        backend.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
        )
    assert bool(tokenizer.encode("alpha")[0] == tokenizer.bos_token_id) == add_bos
    prompts = ["", "alpha beta", "<|im_start|>alpha beta", "alpha beta  \n"]
    examples = [MultipleChoiceExample(str(i), p, ("gamma delta", "mu"), 0) for i, p in enumerate(prompts)]
    lm = HFLM(model, tokenizer=tokenizer, batch_size=1)
    for example, found in zip(
        examples,
        np.split(score_options(model, tokenizer, examples, progress=False).logprob, len(examples)),
        strict=True,
    ):
        pairs = [SimpleNamespace(args=(example.prompt, example.completion(i))) for i in range(2)]
        expected = np.array([value for value, _ in lm.loglikelihood(pairs, disable_tqdm=True)])
        assert np.abs(found - expected).max() <= 1e-4, example.prompt


def test_options_that_share_an_input_share_a_forward(model, monkeypatch):
    rows = []
    forward = type(model.model).forward

    def counting(self, *args, input_ids=None, **kwargs):
        rows.append(input_ids.size(0))
        return forward(self, *args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", counting)
    letters = [MultipleChoiceExample(f"e{i}", tiny.sentence(i), ("a", "b", "c"), 0) for i in range(6)]
    found = score_options(model, tiny.tokenizer(), letters, progress=False)
    assert found.n_tokens.max() == 2  # a space and a letter, of which the space predicts the letter
    assert sum(rows) == len(letters)
    rows.clear()
    alone = score_options(model, tiny.tokenizer(), letters[:1], progress=False, layer=-1)
    assert sum(rows) == 3  # every option's own last state
    assert np.abs(alone.logprob - found.logprob[:3]).max() < 1e-5


@pytest.mark.parametrize("name", sorted(tiny.architectures()))
def test_every_kind_of_head(name):
    """Against float64 logits of the whole model: the architectures scale, cap and shift them."""
    model = tiny.build(name).eval()
    examples = documents(8)
    found = score_options(model, tiny.tokenizer(), examples, progress=False).logprob
    single = _reference(model, examples)
    # The grouped products of experts do not exist in float64
    exact = single if "moe" in name else _reference(model.double(), examples)
    assert np.abs(found - exact).max() <= 4 * np.abs(single - exact).max() + 5e-5


@torch.no_grad()
def _reference(model, examples) -> np.ndarray:
    sums = []
    for example in examples:
        for option in range(len(example.options)):
            context, continuation = encode_pair(tiny.tokenizer(), example.prompt, example.completion(option))
            logps = model(torch.tensor([context + continuation])).logits.double().log_softmax(-1)[0]
            at = range(len(context) - 1, len(context) + len(continuation) - 1)
            sums.append(logps[at, torch.tensor(continuation)].sum().item())
    return np.array(sums)


@pytest.mark.parametrize("layer", [0, -2, -1])
def test_states_are_those_of_the_last_tokens(model, layer):
    examples = documents(12)
    found = score_options(model, tiny.tokenizer(), examples, layer=layer, progress=False)
    assert np.abs(found.logprob - scored(model).logprob[: len(found.logprob)]).max() < 1e-4
    assert found.question_states is not None and found.option_states is not None
    number = 0
    for question, example in enumerate(examples):
        for option in range(len(example.options)):
            context, continuation = encode_pair(tiny.tokenizer(), example.prompt, example.completion(option))
            with torch.no_grad():
                states = model(torch.tensor([context + continuation]), output_hidden_states=True).hidden_states[layer]
            torch.testing.assert_close(found.option_states[number], states[0, -1], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(
                found.question_states[question], states[0, len(context) - 1], atol=1e-4, rtol=1e-4
            )
            number += 1
    assert len({tuple(state.tolist()) for state in found.option_states}) > len(examples)


def test_modes_and_adapters_survive(model):
    adapted = get_peft_model(
        tiny.llama(3), LoraConfig(r=4, target_modules=["q_proj", "lm_head"], lora_dropout=0.0, init_lora_weights=False)
    )
    adapted.train()
    frozen = adapted.get_base_model().model.layers[0]
    frozen.eval()
    examples = documents(6)
    found = score_options(adapted, tiny.tokenizer(), examples, max_length=256, progress=False).logprob
    assert adapted.training and not frozen.training
    assert np.abs(found - _reference(adapted.eval(), examples)).max() < 1e-4
    with adapted.disable_adapter():
        assert np.abs(found - _reference(adapted, examples)).max() > 1e-2


def test_a_layer_or_an_option_that_does_not_fit_is_refused(model):
    example = MultipleChoiceExample("long", "alpha", ("mu " * 40 + "x", "nu"), 0)
    with pytest.raises(ValueError, match=r"'long': option 0 has \d+ tokens.*max_length"):
        score_options(model, tiny.tokenizer(), [example], max_length=16, progress=False)
    with pytest.raises(ValueError, match="layer=-5: the model has 3 hidden states"):
        score_options(model, tiny.tokenizer(), documents(1), layer=-5, progress=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [("id", ""), ("options", ("a",)), ("options", ("a", "")), ("gold", 2), ("gold", -1), ("split", "dev")],
)
def test_examples_that_cannot_be_scored_are_refused(field, value):
    good = {"id": "1", "prompt": "p", "options": ("a", "b"), "gold": 0, "split": "train"}
    with pytest.raises(ValueError, match=f"^{field}"):
        MultipleChoiceExample(**{**good, field: value})


# Training rows


def _merging() -> PreTrainedTokenizerFast:
    """A tokenizer that merges across the boundary of 'un' and 'happy' and has no idea of words."""
    from tokenizers import Tokenizer, models

    vocabulary = {c: i for i, c in enumerate("<>/abcdefghijklmnopqrstuvwxyz ")} | {"<eos>": 30, "nh": 31, "unh": 32}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("n", "h")]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def merging_example() -> MultipleChoiceExample:
    return MultipleChoiceExample("m", "un", ("happy", "sad"), 0, delimiter="")


@pytest.mark.parametrize("merging", [False, True])
def test_training_rows_are_what_is_scored_and_what_trl_makes_of_the_text(merging, tmp_path):
    tokenizer = _merging() if merging else tiny.tokenizer()
    examples = [merging_example()] if merging else documents(30)
    if merging:  # "nh" is one token: neither side of the cut is what either text alone would give
        pair = encode_pair(tokenizer, "un", "happy")
        assert tokenizer.convert_ids_to_tokens(pair.context) == ["u"]
        assert tokenizer.convert_ids_to_tokens(pair.continuation)[0] == "nh"
    pairs = [move_spaces(e.prompt, e.completion(e.gold)) for e in examples]
    texts = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in pairs])
    args = SelectiveSFTConfig(str(tmp_path), max_length=None, use_cpu=True, bf16=False, report_to="none")
    trl = SelectiveSFTTrainer(tiny.llama(), args, train_dataset=texts, processing_class=tokenizer).train_dataset
    rows = [training_row(tokenizer, e) for e in examples]
    given = SelectiveSFTTrainer(
        tiny.llama(), args, train_dataset=training_data(rows), processing_class=tokenizer
    ).train_dataset
    for example, text_row, row, made in zip(examples, trl, rows, given, strict=True):
        context, continuation = encode_pair(tokenizer, example.prompt, example.completion(example.gold))
        assert row["input_ids"] == [*context, *continuation, tokenizer.eos_token_id]
        assert row["labels"] == [-100] * len(context) + row["input_ids"][len(context) :]
        for other in (text_row, made):
            assert list(other["input_ids"]) == row["input_ids"]
            assert list(other["labels"]) == row["labels"]


def test_a_forgotten_answer_keeps_its_end():
    example = MultipleChoiceExample("1", "alpha beta", ("gamma delta", "mu"), 0)
    row = training_row(tiny.tokenizer(), example, weight=-1.0)
    context, continuation = encode_pair(tiny.tokenizer(), example.prompt, example.completion(0))
    assert row["token_weights"] == [0.0] * len(context) + [-1.0] * len(continuation) + [0.0]
    assert training_row(tiny.tokenizer(), example, 1, weight=1.0)["token_weights"][-1] == 1.0
    short = training_row(tiny.tokenizer(), example, weight=-1.0, max_length=len(continuation) + 3)
    assert short == {name: values[-len(continuation) - 3 :] for name, values in row.items()}
    with pytest.raises(ValueError, match="max_length"):
        training_row(tiny.tokenizer(), example, max_length=len(continuation) + 1)
