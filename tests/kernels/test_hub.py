"""The layout for the kernel hub: loaded from a path, in two versions at once, it computes the same."""

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch

import selsft_kernels

ROOT = Path(__file__).parents[2]


def load(package: Path, version: str) -> ModuleType:
    """As the hub does: under a name of its own, with the module that its builder generates."""
    (package / "_ops.py").write_text(
        f"def add_op_namespace_prefix(name):\n    return f'_selsft_{version}::{{name}}'\n"
    )
    name = f"selsft_kernels_{version}"
    spec = importlib.util.spec_from_file_location(name, package / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def packages(tmp_path: Path) -> list[Path]:
    made = []
    for version in ("one", "two"):
        subprocess.run(["make", "-s", "hub", f"HUB={tmp_path / version}"], cwd=ROOT, check=True)
        made.append(tmp_path / version / "torch-ext" / "selsft_kernels")
    return made


def test_two_versions_at_once(packages: list[Path]) -> None:
    hidden, head = torch.randn(5, 8), torch.randn(20, 8)
    target, weight = torch.arange(5), torch.tensor([1.0, -1.0, 0.5, 0.0, -2.0])
    expected = selsft_kernels.linear_selective_cross_entropy(hidden, head, target, weight).loss
    for version, package in zip(("one", "two"), packages, strict=True):
        module = load(package, version)
        assert set(module.__all__) == set(selsft_kernels.__all__)
        assert torch.equal(module.linear_selective_cross_entropy(hidden, head, target, weight).loss, expected)
        assert hasattr(getattr(torch.ops, f"_selsft_{version}"), "linear_loss")


def test_what_the_builder_reads(packages: list[Path]) -> None:
    top = packages[0].parents[1]
    config = tomllib.loads((top / "build.toml").read_text())
    assert config["general"]["name"].replace("-", "_") == packages[0].name and config["torch-noarch"] == {}
    assert {"flake.nix", "CARD.md", "README.md"} <= {path.name for path in top.iterdir()}
    assert not (packages[0] / "_ops.py").exists()
