"""A working directory with what a run needs."""

from pathlib import Path

import pytest
import yaml

from tests.support import tiny
from tests.support.recipe import RECIPE


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with `model`, `rows.jsonl` and `recipe.yaml`."""
    monkeypatch.chdir(tmp_path)
    tiny.llama().save_pretrained("model")
    tiny.tokenizer().save_pretrained("model")
    tiny.prompt_data(48).to_json("rows.jsonl")
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path
