"""Two processes give the loss and the weights of one, on the same global batch: DDP and FSDP2, over gloo on the CPU.

accelerate runs FSDP on accelerators only; the worker makes it believe that it has one (`worker.shard_on_cpu`), so that
the trainer's own FSDP path is what runs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl
from safetensors.torch import load_file

from selsft.training.fingerprint import model_fingerprint
from tests.support import tiny
from tests.support.worker import CASES, LOADED, saved_model, train

pytestmark = pytest.mark.slow

SHARDED = [name for name in CASES if name not in ("separate", "one_without_negatives", "packed")]
FSDP = [
    "--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP",
    "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer", "--fsdp_cpu_ram_efficient_loading", "false",
]  # fmt: skip


# As it ships with TRL: only the main process is sure to load weights
SHIPPED = ["--config_file", str(Path(trl.__file__).parent / "accelerate_configs" / "fsdp2.yaml")]
KINDS = {"ddp": ["--multi_gpu"], "fsdp": FSDP, "fsdp_shipped": SHIPPED}


def launch(folder, kind, cases):
    """`accelerate launch` of the worker with two processes; a port of 0 lets it find a free one."""
    for seed in (0, 1):
        saved_model(folder, seed)
    command = [
        sys.executable, "-m", "accelerate.commands.launch", *KINDS[kind],
        "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", "0", "-m", "tests.support.worker", str(folder), kind, *cases,
    ]  # fmt: skip
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
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


@pytest.fixture(scope="module", params=KINDS)
def double(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    launch(folder, request.param, {"ddp": list(CASES), "fsdp": SHARDED, "fsdp_shipped": list(LOADED)}[request.param])
    return folder


@pytest.mark.parametrize("case", [*CASES, *LOADED])
def test_two_processes_equal_one(case, double, single):
    path = double / f"{case}.json"
    if not path.exists():
        pytest.skip("runs in another kind; nothing of it depends on this one")
    rows, state = single(case)
    negatives = 0.0
    for row, wanted in zip(json.loads(path.read_text()), rows, strict=True):
        for key in ("loss", "grad_norm", "positive_loss", "forget_loss", "negative_fraction", "negative_prob"):
            assert row[key] == pytest.approx(wanted[key], rel=1e-5, abs=1e-7), (key, row, wanted)
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
        torch.testing.assert_close(final[name], value, rtol=1e-5, atol=1e-5, msg=name)
