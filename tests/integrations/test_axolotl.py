"""The plugin for axolotl 0.18: with axolotl itself where it is installed, else with stand-ins of what it imports.

They have the signatures, and as far as the plugin can see the behaviour, of the classes there.
"""

import dataclasses
import importlib
import importlib.util
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from tests.support import tiny

HAS_AXOLOTL = importlib.util.find_spec("axolotl") is not None


class BasePlugin:
    def get_input_args(self) -> str | None: ...
    def get_training_args_mixin(self) -> str | None: ...
    def get_training_args(self, cfg): ...
    def get_trainer_cls(self, cfg) -> type[Trainer] | None: ...
    def get_collator_cls_and_kwargs(self, cfg, is_eval: bool = False): ...


class AxolotlTrainer(Trainer):
    """Keeps its collators, and says that the model does not count tokens, as axolotl's does."""

    def __init__(self, *args, bench_data_collator=None, eval_data_collator=None, dataset_tags=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


@dataclasses.dataclass
class DataCollatorForSeq2Seq:
    """Pads labels, then has the tokenizer pad the rest, which fails for a column that it does not know."""

    tokenizer: Any
    padding: bool = True
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __call__(self, features, return_tensors=None):
        step = self.pad_to_multiple_of or 1
        width = -(-max(len(row["labels"]) for row in features) // step) * step
        rows = []
        for row in features:
            fill = [-100] * (width - len(row["labels"]))
            labels = [*row["labels"], *fill] if self.tokenizer.padding_side == "right" else [*fill, *row["labels"]]
            rows.append({**row, "labels": labels})
        return self.tokenizer.pad(rows, padding=True, pad_to_multiple_of=step, return_tensors="pt")


@dataclasses.dataclass
class BatchSamplerDataCollatorForSeq2Seq(DataCollatorForSeq2Seq):
    """Concatenates the rows of each group, or of all."""

    def __call__(self, features, return_tensors=None):
        groups = features if isinstance(features[0], list) else [features]
        joined = [{key: np.concatenate([row[key] for row in group]) for key in group[0]} for group in groups]
        return super().__call__(joined, return_tensors)


class V2BatchSamplerDataCollatorForSeq2Seq(BatchSamplerDataCollatorForSeq2Seq):
    pass


STAND_INS = {
    "axolotl.integrations.base": {"BasePlugin": BasePlugin},
    "axolotl.core.trainers": {"AxolotlTrainer": AxolotlTrainer},
    "axolotl.monkeypatch.multipack": {"SUPPORTED_MULTIPACK_MODEL_TYPES": ["qwen3"]},
    "axolotl.utils.collators": {
        each.__name__: each
        for each in (
            DataCollatorForSeq2Seq, BatchSamplerDataCollatorForSeq2Seq, V2BatchSamplerDataCollatorForSeq2Seq
        )
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def axolotl():
    """The module of the plugin."""
    if HAS_AXOLOTL:
        yield importlib.import_module("selsft.integrations.axolotl")
        return
    with pytest.MonkeyPatch.context() as patch:
        for name, content in STAND_INS.items():
            parts = name.split(".")
            for length in range(1, len(parts) + 1):
                path = ".".join(parts[:length])
                if path not in sys.modules:
                    patch.setitem(sys.modules, path, types.ModuleType(path))
            for key, value in content.items():
                setattr(sys.modules[name], key, value)
        yield importlib.import_module("selsft.integrations.axolotl")
        sys.modules.pop("selsft.integrations.axolotl")


class Settings(dict):
    """As axolotl's settings: by item or attribute, `None` for what is not there."""

    def __missing__(self, name):
        return None

    def __getattr__(self, name):
        return self[name]


def rows() -> Dataset:
    """Tokenised rows; the last two tokens of each are wrong, the one before is left alone."""
    tokenizer = tiny.tokenizer()
    ids = [tokenizer(tiny.sentence(i, 4 + i % 4))["input_ids"] for i in range(8)]
    return Dataset.from_list(
        [
            {
                "input_ids": row,
                "attention_mask": [1] * len(row),
                "labels": [-100, -100, *row[2:]],
                "token_weights": [0.0, 0.0, *[1.0] * (len(row) - 5), 0.0, -1.0, -1.0],
            }
            for row in ids
        ]
    )


def train(axolotl, tmp_path, data: Dataset, collator: type | None = None, **changes):
    plugin = axolotl.SelectivePlugin()
    module, _, name = plugin.get_training_args_mixin().rpartition(".")
    mixin = getattr(sys.modules[module], name)
    arguments = dataclasses.make_dataclass("Arguments", [], bases=(mixin, *_base_arguments()))
    cfg = Settings({key: changes.pop(key) for key in list(changes) if key.startswith("selsft_")})
    args = arguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=changes.pop("max_steps", 2), seed=0,
        learning_rate=1e-2, logging_steps=1, per_device_train_batch_size=changes.pop("batch", 4), save_strategy="no",
        **plugin.get_training_args(cfg), **changes,
    )  # fmt: skip
    trainer = plugin.get_trainer_cls(cfg)(
        model=tiny.llama(), args=args, train_dataset=data,
        data_collator=(collator or axolotl.SelectiveCollator)(tiny.tokenizer()),
    )  # fmt: skip
    trainer.train()
    return trainer


def _base_arguments() -> tuple[type, ...]:
    if not HAS_AXOLOTL:
        return (TrainingArguments,)
    from axolotl.core.training_args import AxolotlTrainingArguments

    return (AxolotlTrainingArguments,)


def test_settings_reach_the_trainer(axolotl, tmp_path):
    plugin = axolotl.SelectivePlugin()
    module, _, name = plugin.get_input_args().rpartition(".")
    given = getattr(sys.modules[module], name)(selsft_forget_weight=0.5)
    assert given.model_dump()["selsft_forget_objective"] == "unlikelihood"
    trainer = train(axolotl, tmp_path, rows(), selsft_forget_weight=0.5, selsft_forget_schedule="constant")
    assert [line["forget_weight"] for line in trainer.state.log_history[:2]] == [0.5, 0.5]


@pytest.mark.skipif(HAS_AXOLOTL, reason="axolotl's versions exclude those of SelectiveSFTConfig")
def test_settings_are_those_of_the_trainer_of_selsft(axolotl):
    from selsft import SelectiveSFTConfig

    ours = {item.name: item.default for item in dataclasses.fields(SelectiveSFTConfig)}
    for kind in (axolotl.SelectiveTrainingArgs, axolotl.SelectiveArgs):
        for name, value in vars(kind()).items():
            assert ours[name.removeprefix("selsft_")] == value


def test_the_loss_is_that_of_the_definition(axolotl, tmp_path):
    data = rows()
    trainer = train(axolotl, tmp_path, data, max_steps=1, batch=8, selsft_forget_schedule="constant")
    total = count = 0.0
    model = tiny.llama()
    for row in data:
        ids = torch.tensor([row["input_ids"]])
        logp = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        for value, weight in zip(logp, row["token_weights"][1:], strict=True):
            value = value.detach()
            total += float(-value if weight > 0 else -0.25 * torch.log1p(-value.exp()) if weight < 0 else 0)
            count += weight != 0
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / count, abs=2e-4)
    assert trainer.state.log_history[0]["negative_fraction"] == pytest.approx(16 / count)


def test_accumulation_changes_nothing(axolotl, tmp_path):
    def weights(**changes):
        return torch.cat(
            [p.detach().flatten() for p in train(axolotl, tmp_path, rows(), **changes).model.parameters()]
        )

    whole = weights(batch=8, optim="sgd")
    torch.testing.assert_close(weights(batch=2, gradient_accumulation_steps=4, optim="sgd"), whole, atol=2e-5, rtol=0)


def test_negative_tokens_become_less_likely_than_where_they_are_ignored(axolotl, tmp_path):
    """With the weight alone that is the difference: the words are also learned elsewhere in the rows."""

    def last(**changes):
        trainer = train(axolotl, tmp_path, rows(), max_steps=30, batch=8, selsft_forget_schedule="constant", **changes)
        return [line["negative_prob"] for line in trainer.state.log_history if "negative_prob" in line][-1]

    assert last(selsft_forget_weight=4.0) < 0.8 * last(selsft_forget_weight=0.0)


def test_rows_without_weights_train_as_ever(axolotl, tmp_path):
    plain = rows().remove_columns("token_weights")
    ours = train(axolotl, tmp_path, plain).model
    collator = axolotl.DataCollatorForSeq2Seq(tiny.tokenizer())
    base = _base_arguments()[0]
    args = base(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=2, seed=0, learning_rate=1e-2,
        per_device_train_batch_size=4, save_strategy="no", logging_steps=1,
    )  # fmt: skip
    theirs = axolotl.AxolotlTrainer(model=tiny.llama(), args=args, train_dataset=plain, data_collator=collator)
    theirs.train()
    for a, b in zip(ours.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_follows_the_labels(axolotl, side):
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = side
    data = rows().to_list()[:3]
    batch = axolotl.SelectiveCollator(tokenizer, pad_to_multiple_of=8)([dict(row) for row in data])
    for row, weights, labels in zip(data, batch["token_weights"], batch["labels"], strict=True):
        assert weights[labels != -100].tolist() == row["token_weights"][2:] and not weights[labels == -100].any()
    assert batch["token_weights"].shape == batch["input_ids"].shape


@pytest.mark.parametrize("name", ["SelectivePackingCollator", "SelectiveV2PackingCollator"])
def test_packed_rows_keep_their_weights(axolotl, name):
    data = [
        {**row, "labels": list(row["input_ids"]), "token_weights": [1.0] * len(row["input_ids"])} for row in rows()
    ]
    batch = getattr(axolotl, name)(tiny.tokenizer())([data[:3], data[3:5]])
    lengths = [[len(row["input_ids"]) for row in group] for group in (data[:3], data[3:5])]
    for weights, group in zip(batch["token_weights"], lengths, strict=True):
        firsts = np.cumsum([0, *group])[:-1]
        assert not weights[firsts].any(), "the first token of a document has no past"
        assert weights.sum() == sum(group) - len(group)


def test_a_column_of_another_length_is_told(axolotl):
    data = rows().to_list()[:2]
    data[1]["token_weights"] = data[1]["token_weights"][:-1]
    with pytest.raises(ValueError, match=r"token_weights has \d+ values in a row of \d+ tokens"):
        axolotl.SelectiveCollator(tiny.tokenizer())(data)


def test_the_collator_is_chosen_as_axolotl_does(axolotl):
    chosen = axolotl.SelectivePlugin().get_collator_cls_and_kwargs
    packed = {"sample_packing": True, "model_config_type": "of one's own"}
    assert chosen(Settings())[0] is axolotl.SelectiveCollator
    assert chosen(Settings(packed))[0] is axolotl.SelectivePackingCollator
    assert chosen(Settings(packed), is_eval=True)[0] is axolotl.SelectiveCollator
    assert chosen(Settings(packed | {"model_config_type": "qwen3"}))[0] is axolotl.SelectiveV2PackingCollator
    assert (
        chosen(Settings(packed | {"attn_implementation": "flex_attention"}))[0] is axolotl.SelectiveV2PackingCollator
    )


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"selsft_forget_objective": "npo"}, "selsft_forget_objective='npo': use one of .*unlikelihood"),
        ({"selsft_forget_schedule": "cosine"}, "use one of linear, constant"),
        ({"context_parallel_size": 2}, "context_parallel_size=2 with selsft's plugin"),
        ({"batch_flattening": True}, "batch_flattening=True"),
    ],
)
def test_what_has_no_meaning_is_refused(axolotl, setting, match):
    with pytest.raises(ValueError, match=match):
        axolotl.SelectivePlugin().get_trainer_cls(Settings(setting))
