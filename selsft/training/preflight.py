"""What can be told of a model, its adapter and its trackers before any weights are loaded.

A wrong name is told in a second instead of after minutes, and with the flag that it came from. Rejected: giving the
libraries' messages a flag when they fail, since the same message may be about model, reference or base.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, cached_file

from .._compat import find_adapter_config_file, reporting_callbacks
from ..errors import InputError, first_line
from ..records import RUN, file_sha256, read_json

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".index.json")


def weights_sha256(folder: Path) -> dict[str, str]:
    """File -> hash of the weights in a folder, for the record of the run that has trained them."""
    return {path.name: _hashed(path, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.safetensors"))}


@functools.cache
def _hashed(path: Path, changed: int) -> str:
    """A run asks for the same base once for each arm."""
    return file_sha256(path)


def check_model(field: str, name: str, revision: str | None = None) -> None:
    """Raise `InputError` unless `name` is a folder with a model or an adapter, or the id of one that can be loaded."""
    folder = Path(name)
    if folder.is_dir():
        names = sorted(path.name for path in folder.iterdir())
        checkpoints = [each for each in names if each.startswith("checkpoint-")]
        hint = f": give one of its checkpoints, such as {str(folder / checkpoints[-1])!r}" if checkpoints else ""
        if not {CONFIG_NAME, ADAPTER_CONFIG_NAME} & set(names):
            raise InputError(
                f"{field}={name!r} is a folder without a model, it has neither {CONFIG_NAME} nor "
                f"{ADAPTER_CONFIG_NAME}{hint or ': give a folder that save_pretrained or training has written'}"
            )
        if not any(each.endswith(_WEIGHTS) for each in names):
            raise InputError(f"{field}={name!r} holds a configuration but no weights (*.safetensors){hint}")
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes one is enough
            _check_weights(field, folder)
        return
    try:
        if find_adapter_config_file(name, revision=revision) is None:
            cached_file(name, CONFIG_NAME, revision=revision)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{field}={name!r} is neither a folder with a model nor the id of one that can be loaded: check the "
            f"spelling ({first_line(error)})"
        ) from error


def _check_weights(field: str, folder: Path) -> None:
    """Raise for weights that are not those which the run whose record lies beside them has trained."""
    finished = read_json(folder / RUN).get("finished")
    recorded = finished.get("weights") if isinstance(finished, dict) else None
    if not recorded:
        return
    now = weights_sha256(folder)
    for file, digest in recorded.items():
        if now.get(file) != digest:
            raise InputError(
                f"{field}={str(folder)!r}: {file} is {'not the file' if file in now else 'missing, though it is one'} "
                f"that {RUN} says was trained: train it again, or remove {RUN} if you have changed the weights"
            )


def check_adapter(
    name: str, adapter: PeftConfig, revision: str | None = None, trust_remote_code: bool = False
) -> None:
    """Raise `InputError` for an adapter that does not fit the model, by building both without weights."""
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(name, **options), trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, ImportError, NotImplementedError):
        return  # an architecture that cannot be built so is told by what loads it
    modules = dict(model.named_modules())
    targets = getattr(adapter, "target_modules", None)
    targets = [targets] if isinstance(targets, str) else list(targets or ())
    linear = sorted(
        {each.rpartition(".")[2] for each, module in modules.items() if isinstance(module, torch.nn.Linear)}
    )
    remedy = f"the model has the linear layers {', '.join(linear)}; 'all-linear' takes them all"
    if len(targets) == 1 and targets[0] in linear:  # TRL hands a single name on as a string
        remedy = f"a single name is a regular expression for whole names: write '.*{targets[0]}'"
    try:
        get_peft_model(model, copy.deepcopy(adapter))
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"the LoRA flags do not fit {name!r}: {first_line(error)} ({remedy})") from error
    if len(targets) > 1:  # PEFT is content with one that fits
        for target in targets:
            if not any(each == target or each.endswith(f".{target}") for each in modules):
                raise InputError(f"lora_target_modules: {target!r} is not a layer of {name!r}: {remedy}")


def check_trackers(report_to: str | Sequence[str] | None) -> None:
    """Raise `InputError` for a tracker that is not installed, or that transformers does not know."""
    for name in [report_to] if isinstance(report_to, str) else report_to or ():
        try:
            for callback in reporting_callbacks([name]):
                callback()
        except (RuntimeError, ImportError, ValueError) as error:
            raise InputError(f"report_to={name!r}: {first_line(error)} Or set --report_to none") from error
