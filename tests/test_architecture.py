"""The import rules of docs/architecture.md, read from the source: arrows point down, and there is no circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each room with the rooms that it may import; every arrow points to a room further up in this table.
MAY_IMPORT = {
    "errors": set(),
    "secrets": {"errors"},
    "records": {"errors", "secrets"},
    "_compat": set(),
    "config": set(),
    "recipes": {"errors"},
    "data": {"errors", "records", "config", "_compat"},
    "training": {"errors", "records", "config", "_compat", "data"},
    "selection": {"errors", "records", "config", "data"},
    "scoring": {"errors", "records", "config", "_compat", "data", "training", "selection"},
    "trainer": {"errors", "config", "_compat", "data", "training", "selection", "scoring"},
    "evaluation": {"errors", "records", "config", "_compat", "data", "training", "selection", "scoring", "trainer"},
    "score": {"errors", "records", "config", "_compat", "data", "training", "scoring", "trainer", "evaluation"},
    "integrations": set(),
    "score_ray": {"errors", "data", "scoring", "score"},
    "report": {"errors", "records", "config", "data", "selection", "evaluation"},
    "workflow": {"errors", "records", "config", "data", "training", "trainer", "evaluation"},
    "demo": {
        *("errors", "records", "config", "data", "training", "trainer", "scoring", "evaluation", "workflow", "report"),
    },
    "skills": {
        *("errors", "records", "config", "data", "training", "trainer", "scoring", "evaluation", "workflow", "report"),
    },
    "pipeline": {
        *("errors", "secrets", "records", "config", "recipes", "data", "training", "trainer", "selection", "scoring"),
        *("evaluation", "workflow", "report", "demo"),
    },
    "bench": {"errors", "records"},
    "cli": {
        *("errors", "secrets", "records", "_compat", "config", "recipes", "data", "training", "selection", "scoring"),
        *("trainer", "score", "score_ray", "evaluation", "report", "workflow", "demo", "skills", "pipeline", "bench"),
    },
}
KERNEL_IMPORTS = {"torch", "triton", "selsft_kernels"}


def modules(package: str, folder: Path) -> dict[str, Path]:
    found = {}
    for path in folder.rglob("*.py"):
        parts = [package, *path.relative_to(folder).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, source: str, is_package: bool) -> Iterator[str]:
    """Full names of what a module imports anywhere, also inside of functions, but for type checkers alone."""
    tree = ast.parse(source)
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    package = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


SELSFT = modules("selsft", ROOT / "selsft")


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def arrows(name: str) -> set[str]:
    """Modules of selsft that a module imports."""
    path = SELSFT[name]
    found = set()
    for target in imports(name, path.read_text(encoding="utf-8"), path.name == "__init__.py"):
        while target and target not in SELSFT:
            target = target.rpartition(".")[0]
        if target and target != name:
            found.add(target)
    return found


@pytest.mark.parametrize("name", sorted(name for name in SELSFT if name != "selsft"))
def test_arrows_point_down(name):
    for target in arrows(name):
        assert room(target) in {room(name), *MAY_IMPORT[room(name)]}, f"{name} imports {target}"


def test_the_table_has_no_circle():
    """The table alone rules out circles of rooms: each room may import only rooms that stand above it."""
    order = list(MAY_IMPORT)
    for number, (name, allowed) in enumerate(MAY_IMPORT.items()):
        assert allowed <= set(order[:number]), f"{name} may import rooms below it: {allowed - set(order[:number])}"


def test_no_circle_of_modules():
    edges = {name: arrows(name) - {"selsft"} for name in SELSFT if SELSFT[name].name != "__init__.py"}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a circle: {' -> '.join([*above[above.index(name) :], name])}"
        if name not in done:
            for target in sorted(edges.get(name, ())):
                visit(target, (*above, name))
            done.add(name)

    for name in sorted(edges):
        visit(name, ())


def test_the_rules_catch_what_they_forbid():
    source = "def f():\n    from ..cli.train import main\nif TYPE_CHECKING:\n    from ..skills import x\n"
    assert list(imports("selsft.data.columns", source, False)) == ["selsft.cli.train.main"]
    assert "cli" not in set().union(*MAY_IMPORT.values())


def test_kernels_stand_alone():
    folder = ROOT / "kernels" / "selsft_kernels"
    standard = {"__future__"} | set(__import__("sys").stdlib_module_names)
    for name, path in modules("selsft_kernels", folder).items():
        for target in imports(name, path.read_text(encoding="utf-8"), path.name == "__init__.py"):
            assert target.split(".")[0] in KERNEL_IMPORTS | standard, f"{name} imports {target}"
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would shadow the package `kernels` of the Hub
