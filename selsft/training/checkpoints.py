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
    """The last checkpoint that is whole. Saving is no single step, and a run that was killed in it leaves a folder
    that training cannot resume from: `trainer_state.json`, written last, is missing or cut off. Such folders are
    removed."""
    while output.is_dir() and (found := get_last_checkpoint(str(output))):
        try:
            json.loads((Path(found) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            return found
        except (OSError, ValueError):
            logger.warning(f"{found} is not whole, a run was cut off while it was saved: it is removed")
            shutil.rmtree(found)
    return None
