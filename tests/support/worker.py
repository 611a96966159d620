"""One process of the distributed tests: trains every case and writes what it got. Started by `accelerate launch`."""

import json
import os
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from selsft import SelectiveSFTConfig, SelectiveSFTTrainer
from selsft.training.fingerprint import model_fingerprint
from tests.support import tiny


def unequal(index, row):
    """Rows 0 to 3 (process 0) have many negatives, rows 4 to 7 (process 1) few."""
    return [-1.0 if (t % 2 if index < 4 else t == 4) else 1.0 for t in range(len(row))]


def one_without_negatives(index, row):
    return [-1.0 if t % 2 and index < 4 else 1.0 for t in range(len(row))]


def one_without_tokens(index, row):
    return [(-1.0 if t % 2 else 1.0) if index < 4 else 0.0 for t in range(len(row))]


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "lm_head"]}
EXCESS = {"score": "excess", "selection_scope": "batch", "positive_fraction": 0.6}
CASES = {
    "unequal": {"weights": unequal},
    "separate": {"weights": unequal, "forget_normalization": "separate"},
    "one_without_negatives": {"weights": one_without_negatives},
    "one_without_tokens": {"weights": one_without_tokens},
    "accumulated": {"weights": unequal, "gradient_accumulation_steps": 2},
    "lora_with_head": {"weights": unequal, "lora": True},
    "reference": {"reference": True},
    "reference_online": {"reference": True, "precompute_scores": False},
    "reference_online_lora": {"reference": True, "precompute_scores": False, "lora": True},
    "reference_adapter": {"reference": "adapter", "lora": True},
    "reference_adapter_full": {"reference": "adapter"},
    "packed": {"reference": True, "packing": True, "max_length": 14},
    "excess": {"reference": True, **EXCESS, "gradient_accumulation_steps": 2},
    "excess_online_lora": {"reference": True, **EXCESS, "precompute_scores": False, "lora": True},
    "excess_one_pass": {"reference": True, **EXCESS, "excess_passes": 1, "gradient_accumulation_steps": 2},
}


# Models that are loaded from a folder, which processes may do in different ways
LOADED = {
    "loaded": {"loaded": True, "reference": "folder"},
    "loaded_npo": {"loaded": True, "weights": unequal, "forget_objective": "npo"},
    "loaded_online": {"loaded": True, "reference": "folder", "precompute_scores": False},
    "loaded_lora": {"loaded": True, "reference": "adapter", "lora": True},
    "loaded_full_adapter": {"loaded": True, "reference": "adapter"},
}


def saved_model(folder: Path, seed: int) -> str:
    """Folder of a model; made by the process that launches the others, since not all of them would save."""
    path = folder / f"model-{seed}"
    if not path.exists():
        tiny.llama(seed=seed, tie_word_embeddings=False).save_pretrained(path)
    return str(path)


def saved_adapter(folder: Path) -> str:
    """Folder of a LoRA adapter that changes what the model says; each process writes its own copy of the same one."""
    path = folder / f"adapter-{os.environ.get('RANK', '0')}"
    model = get_peft_model(tiny.llama(tie_word_embeddings=False), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(path)
    return str(path)


def train(
    case: str, folder: Path, batch_size: int, sharded: bool = False
) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Three SGD steps over the same 8 rows, whatever the number of processes; the logs and the final weights."""
    settings = dict((CASES | LOADED)[case])
    weights, lora, reference, loaded = (settings.pop(k, None) for k in ("weights", "lora", "reference", "loaded"))
    if reference == "adapter":
        reference = saved_adapter(folder)
    elif reference is not None:
        reference = saved_model(folder, 1) if loaded else tiny.llama(seed=1)
    accumulation = settings.pop("gradient_accumulation_steps", 1)
    rule = (
        {}
        if weights or "positive_fraction" in settings
        else {"negative_threshold": 0.1, "score_base_weight": 1.0, "score_pooling": "token"}
    )
    args = SelectiveSFTConfig(
        str(folder / f"{case}-out"), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        save_strategy="no", logging_steps=1, max_steps=3, learning_rate=0.2, optim="sgd", disable_tqdm=True,
        dataloader_pin_memory=False, train_sampling_strategy="sequential", forget_weight=1.0,
        forget_schedule="constant", scoring_cache_dir=str(folder / "cache"),
        per_device_train_batch_size=batch_size // accumulation, gradient_accumulation_steps=accumulation,
        scoring_batch_size=2, **rule, **settings,
    )  # fmt: skip
    columns = {"token_weights": weights} if weights else {}
    trainer = SelectiveSFTTrainer(
        saved_model(folder, 0) if loaded else tiny.llama(tie_word_embeddings=False),
        args,
        train_dataset=tiny.tokenised_data(8, **columns),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(**LORA) if lora else None,
        reference_model=reference,
    )
    if lora:  # B = 0 gives the factors A no gradient in the first step
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name and not reference:
                    parameter.fill_(0.01)
    trainer.train()
    assert sharded == any(isinstance(parameter, DTensor) for parameter in trainer.model_wrapped.parameters())
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped if sharded else trainer.model)
    (folder / f"{case}-{os.environ.get('RANK', '0')}.sha256").write_text(model_fingerprint(trainer.model))
    return [row for row in trainer.state.log_history if "grad_norm" in row], state


def shard_on_cpu() -> None:
    """Make accelerate run FSDP2 without an accelerator, which it refuses: it decides by the kind of device."""
    from accelerate.state import DistributedType, PartialState

    original = PartialState.__init__

    def on_an_accelerator(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_XPU

    PartialState.__init__ = on_an_accelerator


def leave_weights_empty() -> None:
    """What `fsdp_cpu_ram_efficient_loading` may do, depending on the version of transformers: only the main process
    has the weights of a loaded model. Here the others have NaN, which shows in whatever is computed from it."""
    original = PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls, *args, **kwargs):
        model = original(cls, *args, **kwargs)
        if os.environ.get("RANK", "0") != "0":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(torch.nan)
        return model

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)


def prepare_process(kind: str) -> None:
    if kind != "ddp":
        shard_on_cpu()
    if kind == "fsdp_shipped":
        leave_weights_empty()


def main(folder: Path, kind: str, cases: list[str]) -> None:
    torch.set_num_threads(1)
    prepare_process(kind)
    for case in cases:
        rows, state = train(case, folder, batch_size=4, sharded=kind != "ddp")
        if torch.distributed.get_rank() == 0:
            plain = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
            save_file(plain, folder / f"{case}.safetensors")
            (folder / f"{case}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
