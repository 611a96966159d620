"""What the package may import: torch, triton and itself, without a circle."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "kernels" / "selsft_kernels"
MODULES = {path.stem: ast.parse(path.read_text()) for path in sorted(PACKAGE.glob("*.py"))}


def imports(tree: ast.Module) -> tuple[set[str], set[str]]:
    """`(top-level packages, modules of this package)` that a module imports anywhere."""
    foreign, own = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            foreign |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            foreign.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            own |= {node.module} if node.module else {name.name for name in node.names}
    return foreign, own


def test_only_torch_and_triton_are_imported() -> None:
    for name, tree in MODULES.items():
        allowed = {"torch", *sys.stdlib_module_names} | ({"triton"} if name.endswith("_triton") else set())
        assert imports(tree)[0] <= allowed, name


def test_no_module_imports_itself_through_others() -> None:
    def follow(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        for following in sorted(imports(MODULES[name])[1]):
            follow(following, (*path, name))

    for name in MODULES:
        follow(name, ())


def test_kernels_is_a_folder_and_not_a_package() -> None:
    """A package of this name on the path breaks transformers, which asks for the distribution `kernels`."""
    assert not (PACKAGE.parent / "__init__.py").exists()


def test_names_of_objectives_do_not_need_triton() -> None:
    code = "import sys, selsft_kernels; assert selsft_kernels.FORGET_OBJECTIVES and 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(PACKAGE.parent)}, check=True)


def test_every_kernel_module_has_a_twin() -> None:
    """`backend.implementation` goes from one to the other by name, and calls the same functions."""
    called = {
        "rows": {"loss_rows", "grad_rows"},
        "fold": {"fold", "natural"},
        "gather": {"select_rows", "take_rows"},
        "scale": {"scale_in_place", "scale_into"},
    }
    for name, functions in called.items():
        kernel, twin = (
            {node.name: ast.unparse(node.args) for node in MODULES[stem].body if isinstance(node, ast.FunctionDef)}
            for stem in (f"{name}_triton", name)
        )
        shared = set(kernel) & set(twin)
        assert shared >= functions
        for function in shared - {"transform"}:
            assert kernel[function] == twin[function], function
