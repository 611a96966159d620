"""The package's README: its example runs as pasted, and its modules exist."""

import re
import tomllib
from pathlib import Path

import pytest

import selsft_kernels

pytestmark = pytest.mark.slow

KERNELS = Path(__file__).parents[2] / "kernels"
TEXT = (KERNELS / "README.md").read_text()


def test_the_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["hidden"].grad.isfinite().all() and names["head"].weight.grad.any()


def test_the_table_of_files_is_complete() -> None:
    named = set(re.findall(r"`(\w+\.py)`", TEXT.split("## Files")[1].split("## Testing")[0]))
    assert {path.name for path in (KERNELS / "selsft_kernels").glob("*.py")} - {"__init__.py"} <= named


def test_public_names_are_described() -> None:
    for name in selsft_kernels.__all__:
        assert name in TEXT or name.endswith("Output"), name


def test_alone_it_needs_torch_and_triton_only() -> None:
    project = tomllib.loads((KERNELS / "pyproject.toml").read_text())["project"]
    assert [re.split(r"[<>=; ]", line)[0] for line in project["dependencies"]] == ["torch", "triton"]
    whole = tomllib.loads((KERNELS.parent / "pyproject.toml").read_text())["project"]
    assert set(project["dependencies"]) <= set(whole["dependencies"])
    assert (project["version"], project["requires-python"]) == (whole["version"], whole["requires-python"])
