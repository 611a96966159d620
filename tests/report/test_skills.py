"""The report: what it shows, what it must not show, and that it needs nothing from outside."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from selsft.report import charts
from selsft.report import skills as report
from selsft.skills.results import compute, sensitive
from selsft.skills.table import write_scores
from tests.support.pages import Page
from tests.support.skill_tables import CLUSTERS, HOSTILE, columns, table, write_study

pytestmark = pytest.mark.slow


def write_report(folder):
    return report.write_report(folder, compute(folder))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = write_study(tmp_path_factory.mktemp("study"))
    assert write_report(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def text(study):
    return (study / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_hostile_text_is_escaped(text, page):
    assert "script" not in page.tags and "<script" not in text
    assert "&lt;script&gt;" in text and any(HOSTILE in data for data in page.texts)  # It is there, as text.
    assert "b" in page.tags and "<b>model</b>" not in text and "tiny &lt;b&gt;model&lt;/b&gt;" in text


def test_nothing_comes_from_outside(text, page):
    # aria-label and titles may hold any text; these attributes may not refer to anything but the page itself.
    for tag, name, value in page.attributes:
        assert name not in ("src", "xlink:href", "srcset", "action", "data"), (tag, name, value)
        assert name != "href" or re.fullmatch(r"#questions-\d+", value), (tag, name, value)
        assert not name.startswith("on"), (tag, name)
        if value and "url(" in value:
            assert re.fullmatch(r"url\(#hatch-\w+\)", value)
    assert not {"script", "link", "iframe", "object", "embed", "img", "base", "form"} & set(page.tags)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL).group(1)
    assert "url(" not in style and "@import" not in style and "@font-face" not in style
    assert "prefers-color-scheme: dark" in style
    assert "http://" not in text and "https://" not in text


def test_every_table_is_its_csv(study, page):
    assert len(page.tables) == 12
    for name, rows in page.tables.items():
        frame = pd.read_csv(study / "tables" / name, keep_default_na=False)
        assert len(rows) - 1 == len(frame) > 0, name
        assert len({len(row) for row in rows}) == 1, name
    own = pd.read_csv(study / "tables" / "own.csv")
    shown = page.tables["own.csv"]
    head = shown[0]
    for row, values in zip(shown[1:], own.to_dict("records"), strict=True):
        found = dict(zip(head, row, strict=True))
        assert (
            found["task"].split() == [values["label_task"]]
            and found["area"] == values["area"]
            and found["outcome"] == values["outcome"]
        )
        wanted = f"{values['ratio']:.2f} ({values['ratio_low']:.2f} to {values['ratio_high']:.2f})"
        assert found["ratio"] == wanted
        assert found["forgotten"].startswith(f"{values['forgotten']:.2f} (") and found["collapsed"] == "no"
    cells = pd.read_csv(study / "tables" / "matrices.csv")
    assert len(cells) == 4 * 36 and len(list((study / "tables").glob("*.csv"))) == 14


def test_the_heat_map_is_in_upgma_order_with_its_values(study, text):
    first = re.search(
        r'<svg[^>]*role="img"[^>]*aria-label="Forget ratios across tasks.*?</svg>', text, re.DOTALL
    ).group(0)
    titles = re.findall(r"<title>labels of (\w+), evaluated on (\w+): ([-\d.]+), 95 % interval", first)
    printed = re.findall(r'style="fill:#(?:000000|ffffff)">([-\d.]+)</text>', first)
    assert len(titles) == len(printed) == 36
    assert [f"{float(value):.2f}" for _, _, value in titles] == printed
    for order in (list(dict.fromkeys(t[0] for t in titles)), list(dict.fromkeys(t[1] for t in titles))):
        clusters = [CLUSTERS[name] for name in order]
        assert clusters in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0])
    inside = [float(v) for row, column, v in titles if CLUSTERS[row] == CLUSTERS[column]]
    outside = [float(v) for row, column, v in titles if CLUSTERS[row] != CLUSTERS[column]]
    assert min(inside) > 0.3 > max(outside)
    assert first.count("<polyline") == 10
    csv = pd.read_csv(study / "tables" / "matrices.csv")
    first_map = csv[(csv["value"] == "ratio") & (csv["reference"] == "per_task")]
    assert [f"{x:.3f}" for x in first_map["number"]] == [value for _, _, value in titles]


def test_a_sensitive_task_shows_ids_only(study, text, page):
    assert "SECRET" in pq.read_table(study / "examples.parquet").to_pandas()["prompt"].str.cat()
    assert "SECRET" not in text and "banyan-test-" in text
    for file in (study / "tables").iterdir():
        assert "SECRET" not in file.read_text(encoding="utf-8"), file
    assert any("Texts of this task are not shown" in data for data in page.texts)


def test_which_tasks_are_sensitive():
    tasks = {
        "plain": {"area": "math"},
        "slurs": {"area": "toxicity"},
        "marked": {"area": "math", "sensitive": True},
        "toxigen": {"area": ""},
    }
    for manifest in ({"tasks": tasks}, {"config": {"tasks": [{"name": n, **t} for n, t in tasks.items()]}}):
        assert [sensitive(manifest, name) for name in tasks] == [False, True, True, True]
    assert sensitive({"tasks": tasks}, "unknown") and sensitive({}, "plain") and sensitive({"config": None}, "plain")


def test_warnings_stand_first(text, page):
    assert text.index('class="warnings"') < text.index("<h2>Across tasks") < text.index("<h2>How far")
    assert any(line.startswith("2 seeds: the intervals") for line in page.texts)
    assert any("Predictors: 6 tasks" in line for line in page.texts)
    assert "Unfinished" not in text


def test_the_manifest_is_shown(page):
    shown = next(data for data in page.texts if data.startswith("{"))
    assert json.loads(shown)["versions"] == {"selsft": "0.1.0"}


def test_it_reads_the_folder_only_and_repeats_itself(study, text):
    before = {path: path.read_bytes() for path in study.rglob("*") if path.is_file()}
    write_report(study)
    assert {path: path.read_bytes() for path in study.rglob("*") if path.is_file()} == before


def simple(folder, tuned=1.0, left=0.5, n=120, collapsed=False, tasks=("a",)):
    """One seed, no examples, no hidden states."""

    def margins(right):
        return np.where(np.random.default_rng(0).permutation(n) < round(right * n), 1.0, -1.0)

    gold = np.arange(n) % 2
    constant = np.where(gold == 0, 1.0, -1.0)
    for stage, right in (("base", 0.5), ("finetuned", tuned), ("forgotten", left)):
        for task in tasks:
            label = "" if stage == "base" else task
            model = ("x-seed0", 0, stage, "uniform" if stage == "forgotten" else "", label)
            at = constant if collapsed and stage == "forgotten" else margins(right)
            parts = [columns(model, other, "test", -1, at, gold) for other in tasks]
            if stage != "base" or task == tasks[0]:
                write_scores(folder / "scores" / f"{stage}-{task}.parquet", table(*parts))
    (folder / "study.json").write_text("{}", encoding="utf-8")
    return folder


def test_collapse_and_lack_of_data_are_warned_of(tmp_path):
    write_report(simple(tmp_path, collapsed=True))
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    texts = " ".join(page.texts)
    assert "◆ Collapse: 1 evaluation of a gave nearly always the same answer." in texts
    assert "One seed: the intervals are about questions only" in texts
    assert "No examples.parquet" in texts and "No hidden states were stored" in texts
    assert "One task only: nothing to compare." in texts
    shown = dict(zip(*page.tables["own.csv"][:2], strict=True))
    assert shown["collapsed"] == "1 of 1 seeds" and shown["task"].split() == ["a", "◆"]
    collapse = pd.read_csv(tmp_path / "tables" / "collapse.csv")
    assert list(collapse[collapse["collapsed"]]["stage"]) == ["forgotten"]
    assert (tmp_path / "tables" / "probes.csv").read_text().count("\n") == 1  # A heading, no rows.
    assert not (tmp_path / "tables" / "own.csv").read_text().startswith("\n")


def test_null_is_hatched_and_says_why(tmp_path):
    write_report(simple(tmp_path, tuned=0.52, n=60, tasks=("a", "b")))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    nulls = [data for data in page.titles if "is not 0.05 above chance" in data]
    assert len(nulls) >= 4 and text.count('fill="url(#hatch-m1)" class="null"') == 4
    assert any(line.startswith("No forget ratio for a, b: fine-tuned accuracy 0.52") for line in page.texts)
    assert any(line.startswith("* Few examples: a, b; with 60 to 60 test questions") for line in page.texts)
    assert page.tables["own.csv"][1][2].split() == ["a", "*"]
    shown = dict(zip(*page.tables["own.csv"][:2], strict=True))
    assert shown["ratio"].startswith("null: fine-tuned accuracy") and shown["outcome"].startswith("null: ")


def test_null_beside_values(tmp_path):
    """One task with a ratio and an outcome, one without: pandas writes the missing outcome as NaN."""
    simple(tmp_path, tasks=("a", "b"))
    gold = np.arange(120) % 2
    weak = columns(
        ("x-seed0", 0, "finetuned", "", "b"), "b", "test", -1, np.where(np.arange(120) % 4 < 2, 1.0, -1.0), gold
    )
    write_scores(tmp_path / "scores" / "finetuned-b.parquet", table(weak))
    write_report(tmp_path)
    a, b = Page((tmp_path / "report.html").read_text(encoding="utf-8")).tables["own.csv"][1:]
    assert a[-2] == "down to chance" and b[-2].startswith("null: fine-tuned accuracy 0.50")
    assert not any("nan" in cell for cell in a + b)


def test_a_missing_stage(tmp_path):
    folder = simple(tmp_path)
    (folder / "scores" / "finetuned-a.parquet").unlink()
    (folder / "study.json").write_text('{"stages": ["base-a", "finetuned-a", "forgotten-a"]}', encoding="utf-8")
    write_report(folder)
    texts = " ".join(Page((folder / "report.html").read_text(encoding="utf-8")).texts)
    assert "No forget ratio for a: no fine-tuned model (per_task) of the same seed was evaluated here." in texts


def test_only_a_base_model(tmp_path):
    folder = simple(tmp_path)
    for stage in ("finetuned", "forgotten"):
        (folder / "scores" / f"{stage}-a.parquet").unlink()
    write_report(folder)
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert set(page.tables) == {"collapse.csv"}


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match=r"study\.json: not found"):
        write_report(tmp_path)
    folder = simple(tmp_path)
    (folder / "study.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        write_report(folder)
    (folder / "study.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        write_report(folder)
    (folder / "study.json").write_text("{}")
    (folder / "examples.parquet").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"examples\.parquet: must have the columns"):
        write_report(folder)
    assert not (folder / "report.html").exists() and not (folder / "tables").exists()


def test_examples_are_those_that_changed_and_those_that_did_not(study):
    shown = compute(study, draws=20).shown
    assert set(shown["kind"]) == {"forgotten", "resisted"} and (shown["finetuned_confidence"] > 0.5).all()
    lost, kept = (shown[shown["kind"] == kind] for kind in ("forgotten", "resisted"))
    assert (lost["forgotten_confidence"] < 0.5).all() and (kept["forgotten_confidence"] > 0.5).all()
    assert lost.groupby("task").size().max() == 3 and set(kept.groupby("task").size()) == {3}


def test_colours():
    assert charts.colour(0)[0] == charts.CIVIDIS[0] == charts.colour(-3)[0]
    assert charts.colour(1)[0] == charts.CIVIDIS[-1] == charts.colour(9)[0]
    light = []
    for i in range(51):
        fill, ink = charts.colour(i / 50)
        levels = [_luminance(colour) for colour in (fill, ink)]
        assert (max(levels) + 0.05) / (min(levels) + 0.05) >= 4.5  # WCAG AA.
        light.append(levels[0])
    assert (np.diff(light) > 0).all()


def _luminance(colour):
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return float(np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])


def test_many_warnings_of_a_kind_are_one_line():
    n = 21
    tasks = [f"t{i:02}" for i in range(n)]
    own = pd.DataFrame({"eval_task": tasks, "label_task": tasks, "n_examples": 50, "n_seeds": 3, "ratio": np.nan})
    own = own.assign(ratio_reason=[f"near chance {i}" for i in range(n)], outcome=None, outcome_reason="near chance")
    summary = pd.DataFrame({"eval_task": tasks, "collapsed": True})
    notes = [f"Probe left out: {task}." for task in tasks]
    found = SimpleNamespace(own=own, summary=summary, notes=notes, task_correlations=pd.DataFrame())
    lines = report.warnings(found)
    assert len(lines) == 5 and max(map(len, lines)) < 330
    assert lines[1] == "No forget ratio for 21 tasks, each with its reason in the table."
    assert lines[-1].startswith("Probe left out: 21 times, first t00")


def test_a_task_is_linked_to_its_questions(study, text, page):
    ids = [value for _, name, value in page.attributes if name == "id" and value.startswith("questions-")]
    links = {value for _, name, value in page.attributes if name == "href"}
    assert len(ids) == len(set(ids)) == len(CLUSTERS) and links == {f"#{each}" for each in ids}
    heads = re.findall(r"<details><summary>(\w+)</summary>\n<div id=\"questions-\d+\">", text)
    # banyan is of another area than the others, which come first
    assert heads == [*sorted(set(CLUSTERS) - {"banyan"}), "banyan"]
    plot = re.search(r'aria-label="Forget ratio with.*?</svg>', text, re.DOTALL).group(0)
    assert re.findall(r'class="group">([^<]+)<', plot) == ["commonsense", "toxicity"]


def test_dots_stay_on_their_axis():
    made = [
        charts.Estimate("a", 0.5, 0.25, 1.0),
        charts.Estimate("b", 9.0, -5.0, 20.0),
        charts.Estimate("c", float("nan"), reason="near chance"),
    ]
    plot = charts.dot_plot("Forget ratio", made, [-0.5, 0.0, 1.0, 1.5])
    a, b, c = plot.dots
    assert (a.x - plot.left, a.low - plot.left, a.high - plot.left) == pytest.approx((180, 135, 270))
    assert (b.x - plot.left, b.low - plot.left, b.high - plot.left) == pytest.approx((360, 0, 360))
    assert b.cut and not a.cut
    assert c.x is None and c.title == "near chance" and c.text == "null"
    assert [x - plot.left for x, _, _ in plot.marks] == pytest.approx([0, 90, 270, 360])
    assert [reference for *_, reference in plot.marks] == [False, True, True, False]


def test_nothing_forgotten_shows_no_forgotten_examples(tmp_path):
    shown = compute(simple(tmp_path, left=1.0), draws=20).shown
    assert list(shown["kind"]) == ["resisted"] * 3
