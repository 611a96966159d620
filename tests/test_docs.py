"""README and docs against the code: links, paths, public names, settings, flags, and figures of benchmarks/results.

tests/test_docs_blocks.py runs the blocks of code; here are flags and names in prose and tables too.
"""

import ast
import csv
import functools
import importlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from statistics import median

import pytest

import selsft
from selsft.cli import COMMANDS
from selsft_kernels import FORGET_OBJECTIVES
from tests.test_architecture import MAY_IMPORT

ROOT = Path(__file__).parents[1]
DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md", *DOCS]
PLACEHOLDERS = {"--ARM.flag", "--flag", "--STAGE.flag"}
# Modules that scoring/frozen.py and the one store of scores replace
LEAVING: set[str] = set()

every_page = pytest.mark.parametrize("page", PAGES)


@functools.cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def inline_code(page: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def anchors(page: str) -> set[str]:
    """Ids that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.*)", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


# ------------------------------------------------------------ links and paths


@every_page
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in anchors(str(path.resolve().relative_to(ROOT))), f"{page} links to {target}"


@every_page
def test_paths_exist(page):
    for path in re.findall(
        r"\b(?:selsft|kernels|tests|benchmarks|docs)/[\w./-]+\.(?:py|md|csv|yaml|png)", text_of(page)
    ):
        assert (ROOT / path).exists(), f"{page} names {path}"


def test_readme_is_short():
    assert len(text_of("README.md").splitlines()) < 150


@pytest.mark.parametrize("page", DOCS)
def test_every_page_is_in_the_navigation(page):
    listed = re.findall(r": ([\w-]+\.md)$", text_of("mkdocs.yml"), re.MULTILINE)
    assert listed.count(page.removeprefix("docs/")) == 1


@pytest.mark.parametrize("name", FORGET_OBJECTIVES)
def test_every_objective_is_described(name):
    assert f"| `{name}`" in text_of("docs/objectives.md")


@pytest.mark.parametrize("path", sorted((ROOT / "selsft" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_described(path):
    assert f"../selsft/recipes/{path.name}" in text_of("docs/recipes.md")


# ------------------------------------------------------------ names


@every_page
def test_names_are_public(page):
    text = text_of(page)
    for module, names in re.findall(r"from (selsft[\w.]*) import ([\w, ]+)", text):
        assert module in ("selsft", "selsft_kernels"), f"{page} imports from {module}"
        package = importlib.import_module(module)
        for name in re.split(r",\s*", names.strip()):
            assert name in package.__all__ and hasattr(package, name), f"{page} imports {module}.{name}"
    for name in re.findall(r"python -m (selsft[\w.]*)", text):
        assert importlib.util.find_spec(f"{name}.__main__"), f"{page} runs {name}"
    for package, name in re.findall(r"(?<!-m )\b(selsft(?:_kernels)?)\.([A-Za-z_]\w*)", re.sub(r"\(\S+\)", "", text)):
        public = [*importlib.import_module(package).__all__, "integrations"]  # whose names other tools are told
        assert name in public, f"{page} names {package}.{name}, which is not public"


@pytest.mark.parametrize("name", selsft.__all__)
def test_public_names_import_and_are_documented(name):
    assert getattr(selsft, name) is not None
    assert re.search(rf"`{name}`", text_of("docs/api.md")), f"docs/api.md does not say what {name} is"


@every_page
def test_python_parses_and_settings_exist(page):
    known = {item.name for item in fields(selsft.SelectiveSFTConfig)}
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "SelectiveSFTConfig":
                given = {keyword.arg for keyword in node.keywords if keyword.arg}
                assert given <= known, f"{page}: SelectiveSFTConfig has no {given - known}"


def test_api_lists_the_settings():
    from trl import SFTConfig

    inherited = {item.name for item in fields(SFTConfig)}
    own = {item.name for item in fields(selsft.SelectiveSFTConfig)} - inherited
    section = re.split(r"^## ", text_of("docs/api.md"), flags=re.MULTILINE)
    (table,) = [part for part in section if part.startswith("`SelectiveSFTConfig`")]
    rows = [line for line in table.splitlines() if re.match(r"\| (scores|selection|loss) ", line)]
    assert set(re.findall(r"`(\w+)`", "".join(rows))) == own


# ------------------------------------------------------------ commands


@functools.cache
def flags_of(command: str) -> frozenset[str]:
    """Flags that a command takes, those that it hands on included; no model is loaded."""
    from accelerate.commands.launch import launch_command_parser

    from selsft.cli.arguments import CommandParser
    from selsft.evaluation.settings import EvaluateArguments
    from selsft.pipeline.recipe import RunSettings
    from selsft.pipeline.split import SplitSettings
    from selsft.scoring.settings import ScoreArguments, TokensArguments

    own: dict[str, type | None] = {
        "train": None, "score": ScoreArguments, "tokens": TokensArguments, "evaluate": EvaluateArguments,
    }  # fmt: skip
    if command in own:
        parsers = [CommandParser(command, "", "", own[command]), launch_command_parser()]
        more = {"--config", "--help_all", "--accelerate_config"}
    elif command == "run":
        more = {
            "--dry_run",
            "--from",
            *(f"--{item.name}" for each in (SplitSettings, RunSettings) for item in fields(each)),
        }
        return frozenset(more.union(*map(flags_of, own)))
    elif command == "skills":
        from selsft.cli.skills import SkillsParser

        parsers, more = [SkillsParser()], {"--config"}
    elif command == "completion":
        parsers, more = [], {"bash", "zsh"}
    elif command == "demo":
        from selsft.demo.run import make_parser

        parsers, more = [make_parser()], set()
    elif command == "bench":
        from selsft.bench.kernels import parser

        parsers, more = [parser()], set()
    else:
        module = importlib.import_module(f"selsft.cli.{command}")
        parsers, more = [module._parser()], set()
    return frozenset({flag for each in parsers for flag in each._option_string_actions} | more)


def commands(page: str) -> Iterator[str]:
    """Every `selsft ...` in shell blocks and inline code, without comments."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("selsft "):
                yield line.split(" #")[0]
    for code in inline_code(page):
        if re.match(r"selsft [a-z]", code):
            yield code


@every_page
def test_flags_are_known(page):
    from selsft.pipeline.recipe import STAGES

    stage = re.compile(rf"--(?:{'|'.join((*STAGES, 'strict'))})\.")  # and arms
    for line in commands(page):
        command = line.split()[1]
        assert command in COMMANDS, f"{page}: {line}"
        for part in line.split()[2:]:
            flag = stage.sub("--", part.split("=")[0])
            if flag.startswith("--") and flag not in PLACEHOLDERS:
                assert flag in flags_of(command), f"{page}: selsft {command} has no {flag}: {line}"
    everywhere = frozenset().union(*map(flags_of, COMMANDS), ("--help", "--version"))
    for code in inline_code(page):
        if code.startswith("--") and code.split()[0] not in PLACEHOLDERS:
            assert stage.sub("--", code.split()[0].split("=")[0]) in everywhere, f"{page}: no command has {code}"


# ------------------------------------------------------------ errors


@functools.cache
def literals() -> str:
    """Every string of the package, f-strings by their fixed parts."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "selsft").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def quoted_errors() -> list[str]:
    table = text_of("docs/errors.md").partition("the error begins with")[2].partition("\n\n")[0]
    lines = re.findall(r"^selsft \w+: error: (.*)", text_of("docs/errors.md"), re.MULTILINE)
    return re.findall(r"`([^`]+ [^`]+)`", table.replace("`weight`", "")) + lines


@pytest.mark.parametrize("message", quoted_errors())
def test_quoted_errors_are_raised(message):
    """The longest part of the message that holds no value stands in the source."""
    parts = re.split(r"=\S+|'[^']*'|--\S+|/\S+|\d+ ?|\.\.\.|\[.*?\]|: ", message)
    assert message in literals() or max(parts, key=len) in literals()


# ------------------------------------------------------------ the architecture page


def tree() -> dict[str, bool]:
    """Paths of the tree in docs/architecture.md, below selsft/, and whether each is marked as coming."""
    (block,) = [each for each in blocks("docs/architecture.md", "") if each.startswith("selsft/\n")]
    found, room = {}, ""
    for line in block.partition("\nkernels/")[0].splitlines()[1:]:
        name, indent = line.split()[0], len(line) - len(line.lstrip())
        room = name if indent == 2 and name.endswith("/") else room if indent == 4 else ""
        for part in re.findall(r"\S+\.py|\S+/", re.split(r"\s{2,}", line.strip())[0]):
            found[part if indent == 2 else room + part] = line.endswith("(coming)")
    return found


def test_the_tree_is_the_tree():
    listed = tree()
    for path, coming in listed.items():
        assert coming or (ROOT / "selsft" / path).exists(), f"docs/architecture.md lists selsft/{path}"
    there = {str(path.relative_to(ROOT / "selsft")) for path in (ROOT / "selsft").rglob("*.py")}
    there = {path for path in there if path.rpartition("/")[2] not in ("__init__.py", "__main__.py")}
    assert not there - listed.keys() - LEAVING, f"docs/architecture.md lacks {sorted(there - listed.keys() - LEAVING)}"


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_every_room_is_in_the_drawing(room):
    (drawing,) = [each for each in blocks("docs/architecture.md", "") if "──►" in each]
    assert re.search(rf"\b{room}\b", drawing)


# ------------------------------------------------------------ figures


def results(name: str, **wanted: str) -> list[float]:
    with (ROOT / "benchmarks" / "results" / name).open(newline="") as handle:
        return [float(row["value"]) for row in csv.DictReader(handle) if wanted.items() <= row.items()]


def table_rows(page: str, label: str) -> list[list[str]]:
    """Cells behind a label, of each table row of the page that begins with it; bold is dropped."""
    lines = re.findall(rf"^\| {re.escape(label)}.*", text_of(page), re.MULTILINE)
    return [[cell.strip().replace("**", "") for cell in line.split("|")[2:-1]] for line in lines]


@pytest.mark.parametrize(
    "page, label, digits, what, quantity",
    [
        ("README.md", "seconds per step", 2, "step", "wall_s"),
        ("README.md", "loss layer alone", 2, "loss layer", "processor_s"),
        ("README.md", "loss layer, peak", 0, "loss layer", "peak_bytes"),
        ("docs/experiments.md", "seconds per step", 2, "step", "wall_s"),
        ("docs/experiments.md", "loss layer, forward", 2, "loss layer", "processor_s"),
        ("docs/experiments.md", "loss layer: peak", 1, "loss layer", "peak_bytes"),
        ("docs/experiments.md", "training: growth", 0, "training", "resident_bytes"),
    ],
)
def test_step_figures_are_those_of_the_results(page, label, digits, what, quantity):
    unit = 2**20 if quantity.endswith("bytes") else 1
    trl, ours = (results("step-cpu.csv", what=what, arm=arm, quantity=quantity) for arm in ("trl", "selsft"))
    ((*cells, ratio),) = [row[:3] for row in table_rows(page, label)]
    for values, cell in zip((trl, ours), cells, strict=True):
        middle, low, high = (f"{value / unit:.{digits}f}" for value in (median(values), min(values), max(values)))
        assert cell == (f"{middle} [{low}, {high}]" if "[" in cell else middle)
    assert ratio == f"{median(ours) / median(trl):.2f}"


def test_scoring_figures_are_those_of_the_results():
    def rate(arm: str) -> list[float]:
        return results("scoring-cpu.csv", what="throughput", arm=arm, quantity="tokens_per_s")

    ours, plain = rate("selsft"), rate("plain")
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    ratio = f"{median(ratios):.1f} [{min(ratios):.1f}, {max(ratios):.1f}]"
    assert table_rows("README.md", "tokens per processor second") == [
        [f"{median(plain):,.0f}", f"{median(ours):,.0f}", ratio]
    ]
    spread = [f"{median(each):,.0f} [{min(each):,.0f}, {max(each):,.0f}]" for each in (ours, plain, rate("body"))]
    assert table_rows("docs/scoring.md", "tokens per second") == [[*spread, ratio]]

    ours, plain, body = (results("scoring-cpu.csv", what="memory", arm=arm) for arm in ("selsft", "plain", "body"))
    shown = {arm: f"{median(each) / 2**20:,.0f}" for arm, each in (("ours", ours), ("plain", plain), ("body", body))}
    share = f"{median(ours) / median(plain):.2f}"
    assert table_rows("README.md", "growth of peak memory") == [[shown["plain"], shown["ours"], share]]
    assert table_rows("docs/scoring.md", "growth of the peak") == [
        [*(shown[x] for x in ("ours", "plain", "body")), share]
    ]
