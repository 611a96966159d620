"""Which checkpoint a run resumes from."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

logger = logging.getLogger(__name__)


def last_checkpoint(output: Path) -> str | None:
    """The last complete checkpoint. Saving takes several steps, and a run that is killed during them leaves a folder
    that training cannot resume from: `trainer_state.json`, written last, is missing or truncated. Such folders are
    removed."""
    while output.is_dir() and (last := get_last_checkpoint(str(output))):
        try:
            json.loads((Path(last) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            return last
        except (OSError, ValueError):
            logger.warning(f"{last} is not complete, a run was interrupted while saving it: it is removed")
            shutil.rmtree(last)
    return None
