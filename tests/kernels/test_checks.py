"""Wrong arguments are refused with a ValueError that names the argument."""

from typing import Any

import pytest
import torch

from selsft_kernels import linear_logprob, linear_selective_cross_entropy, selective_cross_entropy
from tests.support.kernel_targets import OUTSIDE, check_outside


def arguments() -> dict[str, Any]:
    return {
        "input": torch.zeros(2, 3, 4),
        "linear_weight": torch.zeros(5, 4),
        "target": torch.zeros(2, 3, dtype=torch.int64),
        "token_weight": torch.ones(2, 3),
    }


BAD = {
    "input-dtype": ({"input": torch.zeros(2, 3, 4, dtype=torch.float64)}, "input has dtype"),
    "input-scalar": ({"input": torch.zeros(())}, "input has no dimension"),
    "weight-dim": ({"linear_weight": torch.zeros(4)}, "linear_weight has shape"),
    "weight-hidden": ({"linear_weight": torch.zeros(5, 3)}, "linear_weight has shape"),
    "weight-dtype": ({"linear_weight": torch.zeros(5, 4, dtype=torch.bfloat16)}, "linear_weight is torch.bfloat16"),
    "vocabulary-of-one": ({"linear_weight": torch.zeros(1, 4)}, "linear_weight has a vocabulary of 1"),
    "target-shape": ({"target": torch.zeros(6, dtype=torch.int64)}, "target has shape"),
    "target-dtype": ({"target": torch.zeros(2, 3, dtype=torch.int32)}, "target has dtype"),
    "target-high": ({"target": torch.full((2, 3), 5)}, "target has the value 5"),
    "target-low": ({"target": torch.full((2, 3), -1)}, "target has the value -1"),
    "rows-dtype": ({"active_rows": torch.zeros(2)}, "active_rows is"),
    "rows-high": ({"active_rows": torch.tensor([0, 6])}, "active_rows has the value 6"),
    "rows-low": ({"active_rows": torch.tensor([0, -1])}, "active_rows has the value -1"),
    "rows-twice": ({"active_rows": torch.tensor([1, 1])}, "active_rows names a row twice"),
    "bias-shape": ({"linear_bias": torch.zeros(4)}, "linear_bias has shape"),
    "bias-dtype": ({"linear_bias": torch.zeros(5, dtype=torch.int64)}, "linear_bias has dtype"),
    "softcap": ({"softcap": 0.0}, "softcap=0.0"),
    "scale": ({"logit_scale": float("nan")}, "logit_scale=nan"),
    "scale-zero": ({"logit_scale": 0.0}, "logit_scale=0.0"),
    "outputs": ({"outputs": ("probability",)}, "outputs has 'probability'"),
    "outputs-string": ({"outputs": "logprob"}, "outputs='logprob' is a string"),
    "chunk": ({"chunk_size": 0}, "chunk_size=0"),
    "lora-half": ({"lora_a": torch.zeros(2, 4)}, "lora_b is None"),
    "lora-a": ({"lora_a": torch.zeros(2, 3), "lora_b": torch.zeros(5, 2)}, "lora_a has shape"),
    "lora-b": ({"lora_a": torch.zeros(2, 4), "lora_b": torch.zeros(5, 3)}, "lora_b has shape"),
    "lora-dtype": (
        {"lora_a": torch.zeros(2, 4), "lora_b": torch.zeros(5, 2, dtype=torch.int64)},
        "lora_b has dtype",
    ),
    "device": ({"target": torch.zeros(2, 3, dtype=torch.int64, device="meta")}, "target is on meta"),
}
LOSS_ONLY = {
    "weights-shape": ({"token_weight": torch.ones(2)}, "token_weight has shape"),
    "weights-dtype": ({"token_weight": torch.ones(2, 3, dtype=torch.int8)}, "token_weight has dtype"),
    "positive": ({"positive": "ce"}, "positive='ce'"),
    "forget": ({"forget": "ga"}, "forget='ga'"),
    "beta": ({"beta": 0.0}, "beta=0.0"),
    "floor": ({"floor": 0.0}, "floor=0.0"),
    "anchor": ({"anchor": -1.0, "reference_logprob": torch.zeros(2, 3)}, "anchor=-1.0"),
    "anchor-without-reference": ({"anchor": 1.0}, "reference_logprob is None; anchor=1.0"),
    "dead": ({"dead_below": -1.0}, "dead_below=-1.0"),
    "z-loss": ({"z_loss": 0.0}, "z_loss=0.0"),
    "gate": ({"entropy_gate": 0.0}, "entropy_gate=0.0"),
    "npo-without-reference": ({"forget": "npo"}, "reference_logprob is None"),
    "reference-shape": ({"reference_logprob": torch.zeros(2)}, "reference_logprob has shape"),
    "weight-grad-dtype": ({"weight_grad_dtype": torch.float16}, "weight_grad_dtype=torch.float16"),
}


@pytest.mark.parametrize(("change", "message"), [*BAD.values(), *LOSS_ONLY.values()], ids=[*BAD, *LOSS_ONLY])
def test_linear_loss(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        linear_selective_cross_entropy(**{**arguments(), **change})


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=list(BAD))
def test_linear_logprob(change: dict, message: str) -> None:
    given = {**arguments(), **change}
    del given["token_weight"]
    with pytest.raises(ValueError, match=message):
        linear_logprob(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, 5, dtype=torch.float64)}, "logits has dtype"),
        ({"logits": torch.zeros(2, 3, 1)}, "logits has a vocabulary of 1"),
        ({"logits": torch.zeros(2, 5, 3).transpose(1, 2), "inplace_backward": True}, "logits is not contiguous"),
        ({"target": torch.full((2, 3), 7)}, "target has the value 7"),
        ({"target": torch.zeros(3, 2, dtype=torch.int64)}, "target has shape"),
        ({"token_weight": torch.ones(2, 3, dtype=torch.float64)}, "token_weight has dtype"),
        ({"forget": "npo"}, "reference_logprob is None"),
        ({"outputs": ("loss",)}, "outputs has 'loss'"),
        ({"softcap": -1.0}, "softcap=-1.0"),
    ],
)
def test_logits(change: dict, message: str) -> None:
    given = {"logits": torch.zeros(2, 3, 5), **arguments()}
    del given["input"], given["linear_weight"]
    with pytest.raises(ValueError, match=message):
        selective_cross_entropy(**{**given, **change})


def test_the_arguments_themselves_are_accepted() -> None:
    linear_selective_cross_entropy(**arguments())


@pytest.mark.parametrize("bad", OUTSIDE)
def test_a_target_outside_the_vocabulary_is_nan_on_a_device(bad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices without Triton run the torch path too, and nobody looks at their targets on the host."""
    check_outside(bad, torch.device("cpu"), monkeypatch)
