"""Every private or semi-private name of TRL and transformers that selsft touches, in one place.

A minor release of either library may move these names. Keeping them here means that an unsupported version fails when
selsft is imported, with one line that says what to install, and not as a wrong loss after an hour of training. The
alternative, `try/except ImportError` next to each use, was rejected: it hides which versions were tested.

What is used, where it is, and which versions have it:

- `DataCollatorForLanguageModeling`, base class of our collator: trl.trainer.sft_trainer, 0.20 to 1.16
- `FusedCausalLMOutput`, what `SFTTrainer.compute_loss` reads: trl.trainer.utils, 1.15 to 1.16
- `maybe_gather_lm_head_ctx`, LM-head weight under ZeRO-3: trl.trainer.utils, 1.9 to 1.16
- `use_adapter`, switching an adapter on and off: trl.trainer.utils, 0.20 to 1.16
- `create_model_from_path`, `get_config_model_id`, loading the reference as TRL loads the model: trl.trainer.utils, 1.0
  to 1.16
- `pad`, padding of the token columns: trl.trainer.utils, 0.20 to 1.16
- `prepare_deepspeed`, a frozen model beside the trained one: trl.models.utils, 1.9 to 1.16
- `fsdp2_prepare_model`, the same under FSDP2: accelerate.utils.fsdp_utils, 1.6 to 1.14
- `SFTTrainer._prepare_dataset`, `._set_signature_columns_if_needed`, `._metrics`, `._is_vision_dataset`,
  `._tokenizer`, `.padding_free`, `.chat_template`: 1.15 to 1.16
- `BaseTunerLayer` as a global of trl.trainer.sft_trainer, for its check against adapters on `lm_head`: 1.15 to 1.16
- `Trainer.get_batch_samples`, `.model_accepts_loss_kwargs`: transformers 5.17 to 5.23
- `config._attn_implementation`, whether rows can be concatenated at no cost: transformers 4.36 to 5.23
- `ExportableState` and `TrainerState.stateful_callbacks`, by which a callback's state survives a resume:
  transformers.trainer_callback, 4.42 to 5.23
- `get_temporary_cache_files_directory`, a folder that goes with the process: datasets.fingerprint, 1.2 to 5.2
- `find_adapter_config_file`: transformers.utils.peft_utils, 5.0 to 5.23
- `get_reporting_integration_callbacks`, the callbacks behind `report_to`: transformers.integrations, 4.36 to 5.23
- `load_balancing_loss_func`, auxiliary loss of Mixture-of-Experts models: transformers.models.mixtral, 4.36 to 5.23
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import time
from collections.abc import Iterator
from unittest import mock

import torch
from packaging.version import Version

# package -> (oldest supported, first unsupported or None). TRL and transformers end at the last release that the tests
# ran with, since selsft hooks into parts that a minor release may change; the others are used through public names.
SUPPORTED: dict[str, tuple[str, str | None]] = {
    "torch": ("2.8", None),
    "transformers": ("5.17", "5.24"),
    "trl": ("1.16", "1.17"),
    "peft": ("0.18", None),
    "datasets": ("4.7", None),
    "accelerate": ("1.10.1", None),
}


def check_versions(installed: dict[str, str] | None = None) -> None:
    """Raise `ImportError` with one line when an installed package is outside the supported range.

    Args:
        installed: package name -> version; read from the environment when not given.
    """
    for package, (oldest, limit) in SUPPORTED.items():
        try:
            found = installed[package] if installed is not None else importlib.metadata.version(package)
        except (KeyError, importlib.metadata.PackageNotFoundError):
            raise ImportError(
                f"selsft needs {package}>={oldest}, which is not installed: pip install selsft"
            ) from None
        wanted = f">={oldest}" + (f",<{limit}" if limit else "")
        # `Version("2.13.0+cpu") >= Version("2.8")`: local and development parts compare as they should
        if Version(found) < Version(oldest) or (limit and Version(found) >= Version(limit)):
            raise ImportError(
                f"selsft supports {package}{wanted}, found {package} {found}: pip install '{package}{wanted}'"
            )


check_versions()

import trl.trainer.sft_trainer as _sft_trainer  # noqa: E402
from accelerate.utils.fsdp_utils import fsdp2_prepare_model  # noqa: E402
from transformers.integrations import get_reporting_integration_callbacks as reporting_callbacks  # noqa: E402
from transformers.utils.peft_utils import find_adapter_config_file  # noqa: E402
from trl.models.utils import prepare_deepspeed as _prepare_deepspeed  # noqa: E402
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling  # noqa: E402
from trl.trainer.utils import (  # noqa: E402
    FusedCausalLMOutput,
    create_model_from_path,
    get_config_model_id,
    maybe_gather_lm_head_ctx,
    pad,
    use_adapter,
)


def _require(owner: type, *names: str) -> None:
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        version = importlib.metadata.version(owner.__module__.split(".")[0])
        raise ImportError(
            f"selsft hooks into {owner.__name__}.{missing[0]}, which version {version} does not have: "
            "install the versions of constraints.txt"
        )


_require(
    _sft_trainer.SFTTrainer,
    "_prepare_dataset",
    "_set_signature_columns_if_needed",
    "get_batch_samples",
    "compute_loss",
    "log",
)


@contextlib.contextmanager
def adapter_on_lm_head() -> Iterator[None]:
    """Let `SFTTrainer.__init__` accept a PEFT adapter on `lm_head`, which its own loss would drop; ours does not."""
    with mock.patch.object(_sft_trainer, "BaseTunerLayer", type("NoTunerLayer", (), {})):
        yield


def prepare_fsdp2(model, accelerator):
    """Shard a frozen model, layer by layer, in place; under `cpu_ram_efficient_loading` the other processes get the
    weights of the main one. TRL's `prepare_fsdp` shards the model as one unit and leaves empty weights empty.

    accelerate notes in its plugin which layers it wraps, and would then look for those of this model in the trained
    one: so the plugin gets its own settings back.
    """
    plugin = accelerator.state.fsdp_plugin
    own = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
    if {type(module).__name__ for module in model.modules()}.isdisjoint(plugin.transformer_cls_names_to_wrap or ()):
        plugin.transformer_cls_names_to_wrap = None  # the layers are those of another architecture
    try:
        return fsdp2_prepare_model(accelerator, model).eval()
    finally:
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = own


def prepare_deepspeed(model, accelerator):
    """Give a frozen model to DeepSpeed: on its device, and under ZeRO-3 partitioned, with hooks that gather.

    The model comes back, and not the engine around it: a `PeftModel` must stay one for whoever switches its adapters.
    """
    return _prepare_deepspeed(model, accelerator).module


def uses_flash_attention(model) -> bool:
    """Whether the model's attention keeps concatenated rows apart at no cost."""
    return "flash" in (getattr(model.config, "_attn_implementation", None) or "")


@functools.cache
def load_balancing_loss():  # the function that every Mixture-of-Experts family of transformers pulls in
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return load_balancing_loss_func


__all__ = [
    "DataCollatorForLanguageModeling",
    "FusedCausalLMOutput",
    "adapter_on_lm_head",
    "check_versions",
    "create_model_from_path",
    "find_adapter_config_file",
    "get_config_model_id",
    "load_balancing_loss",
    "maybe_gather_lm_head_ctx",
    "pad",
    "prepare_deepspeed",
    "prepare_fsdp2",
    "reporting_callbacks",
    "use_adapter",
    "uses_flash_attention",
]


def save_whole_model(trainer, folder: str) -> None:
    """`Trainer.save_model`, which under FSDP with sharded checkpoints (accelerate's default) saves no model at all."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if trainer.is_fsdp_enabled and plugin is not None:
        plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(folder)


def end_training(trainer) -> None:
    """Close trackers and process groups: `Trainer.end` where transformers has it, else accelerate's own.

    Gloo's thread takes the GIL to drop its last collective. The group's destructor, which runs when the caller
    returns, waits for that thread with the GIL held (torch 2.13). The pause lets the thread finish first.
    """
    if torch.distributed.is_initialized():
        trainer.accelerator.wait_for_everyone()
        time.sleep(0.5)
    getattr(trainer, "end", trainer.accelerator.end_training)()
