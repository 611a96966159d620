"""Two processes give the loss and the weights of one, on the same global batch: DDP, FSDP2, ZeRO-2 and ZeRO-3, over
gloo on the CPU.

accelerate runs FSDP and DeepSpeed on accelerators only; the worker makes it believe that it has one, so that the
trainer's own path is what runs.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from selsft.training.fingerprint import model_fingerprint
from tests.support import tiny
from tests.support.worker import CASES, LOADED, WHOLE, saved_model, train

pytestmark = pytest.mark.slow

# fp32 adds what the processes give in another order. No score lies so close to the boundary that this changes a class;
# then errors are below 2e-7 in the weights, which are about 0.1, and 1e-6 relative in the logs
ATOL, RTOL = 1e-6, 1e-5
DEEPSPEED = [
    "unequal", "accumulated", "lora_with_head", "reference", "reference_online", "reference_online_lora",
    "reference_adapter_full", "excess_one_pass",
]  # fmt: skip
SHARDED = [name for name in CASES if name not in ("separate", "one_without_negatives", "packed")]
FSDP = [
    "--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP",
    "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer", "--fsdp_cpu_ram_efficient_loading", "false",
]  # fmt: skip


def shipped(name: str) -> list[str]:
    """A configuration as it ships with TRL."""
    return ["--config_file", str(Path(trl.__file__).parent / "accelerate_configs" / f"{name}.yaml")]


KINDS = {
    "ddp": ["--multi_gpu"],
    "fsdp": FSDP,
    "fsdp_shipped": shipped("fsdp2"),  # only the main process is sure to load weights
    "zero2": shipped("zero2"),
    "zero3": shipped("zero3"),
}
RUNS = {
    "ddp": list(CASES),
    "fsdp": [*SHARDED, *WHOLE],
    "fsdp_shipped": [*LOADED, *WHOLE],
    "zero2": [*DEEPSPEED, "loaded", *WHOLE],  # its weights are whole
    "zero3": [*DEEPSPEED, *LOADED, *WHOLE],
}


def interpreter(kind: str) -> Path | None:
    """The Python that a kind runs in; `None` where it is not installed. DeepSpeed changes what accelerate does as
    soon as it can be imported, so `make` keeps it in an environment of its own beside this one."""
    if not kind.startswith("zero") or importlib.util.find_spec("deepspeed"):
        return Path(sys.executable)
    beside = Path(sys.prefix).with_name(".venv-deepspeed") / "bin" / "python"
    return beside if beside.exists() else None


def launch(python, folder, kind, cases):
    """`accelerate launch` of the worker with two processes; a port of 0 lets it find a free one."""
    for seed in (0, 1):
        saved_model(folder, seed)
    command = [
        str(python), "-m", "accelerate.commands.launch", *KINDS[kind],
        "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", "0", "-m", "tests.support.worker", str(folder), kind, *cases,
    ]  # fmt: skip
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    if not kind.startswith("zero"):
        environment["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-12000:]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """One process, the whole batch: computed once for both kinds."""
    folder, results = tmp_path_factory.mktemp("single"), {}

    def result(case):
        if case not in results:
            results[case] = train(case, folder, batch_size=8)
        return results[case]

    return result


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(kind, tmp_path, single):
    """All cases of a kind in one launch, which costs more than they do; so they are one test."""
    python = interpreter(kind)
    if python is None:
        pytest.skip("DeepSpeed is not installed: `make test` does that")
    launch(python, tmp_path, kind, RUNS[kind])
    wrong = []
    for case in RUNS[kind]:
        try:
            compare(case, tmp_path, *single(case))
        except AssertionError as error:
            wrong.append(f"{case}: {error}")
    assert not wrong, "\n\n".join(wrong)


def compare(case, double, rows, state):
    """What two processes have written in `double`, with the logs and the weights of one."""
    negatives = 0.0
    for row, wanted in zip(json.loads((double / f"{case}.json").read_text()), rows, strict=True):
        if "eval_loss" in wanted:
            assert row["eval_loss"] == pytest.approx(wanted["eval_loss"], rel=RTOL)
            continue
        for key in ("loss", "grad_norm", "positive_loss", "forget_loss", "negative_fraction", "negative_prob"):
            assert row[key] == pytest.approx(wanted[key], rel=RTOL, abs=1e-7), (key, row, wanted)
        negatives += row["negative_fraction"]
    assert negatives > 0.3
    digests = {(double / f"{case}-{rank}.sha256").read_text() for rank in (0, 1)}
    assert len(digests) == 1  # of the whole model, sharded or not
    final = load_file(double / f"{case}.safetensors")
    if case in ("unequal", "loaded"):
        model = tiny.llama(tie_word_embeddings=False)
        model.load_state_dict(final)
        assert digests == {model_fingerprint(model)}
    assert final.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(final[name], value, rtol=RTOL, atol=ATOL, msg=name)
    if case in WHOLE:
        saved = double / f"{case}-saved"
        model = tiny.llama(tie_word_embeddings=False)
        lora = "lora" in case
        model = PeftModel.from_pretrained(model, saved) if lora else AutoModelForCausalLM.from_pretrained(saved)
        loaded = model.state_dict()
        assert loaded.keys() == final.keys()
        for name, value in final.items():
            assert torch.equal(loaded[name], value), name
