"""What a run says of itself: pairs, verdicts, and a page that text cannot break."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selsft.evaluation.settings import METRICS, ROWS
from selsft.pipeline.outlook import OUTLOOK
from selsft.pipeline.results import results
from selsft.records import write_json
from selsft.report.run import print_report, write_report
from selsft.selection.select import COUNTS
from tests.support.pages import Page

HOSTILE = "<script>alert(1)</script>\x00\x1b[31m\u202egnp.exe\u2066\ufeff</td>"
SHIFTS = {"base": 0.5, "plain": 0.0, "ignore": -0.1, "forget": -0.2}


def run_folder(root, shifts=None, *, rows=40, negative=0.1, seeds=1, finished=True, wrong=False, **more):
    """The files of a run whose arms differ by `shifts` nats a token from the same held-out rows."""
    stages, rng = {}, np.random.default_rng(0)
    level, tokens = rng.normal(2.0, 0.5, rows), rng.integers(3, 9, rows)
    arms = {}
    for name, shift in (shifts or SHIFTS).items():
        numbers = [0] if name == "base" else range(seeds)
        if name != "base":
            arms[name] = {"kind": name, "changes": {}, "train": [f"train-{name}-seed{n}" for n in numbers]}
        for number in numbers:
            stage = "base" if name == "base" else f"{name}-seed{number}"
            folder = root / f"evaluate-{stage}" / "evaluation"
            folder.mkdir(parents=True)
            nll = (level + shift + rng.normal(0, 0.05, rows)) * tokens
            table = {
                "row": list(range(rows)), "tokens": tokens, "nll": nll, "exact_match": [False] * rows,
                "reference": [f"gold {HOSTILE}"] * rows, "question": [f"why {HOSTILE}?"] * rows,
                "answer": [f"{name} {HOSTILE}"] * rows, "chrf": rng.random(rows),
            }  # fmt: skip
            if wrong:
                table |= {"nll_right": nll / 2, "right_tokens": tokens, "nll_wrong": nll, "wrong_tokens": tokens}
            pq.write_table(pa.table(table), folder / ROWS)
            metrics = {"nll": 1.0, "accepts": "completion", "text_nats_per_token": 3.0 + shift / 100}
            write_json(folder / METRICS, metrics | {"lm_eval": {"piqa": {"acc": 0.5}}})
            stages[f"evaluate-{stage}"] = {"folder": f"evaluate-{stage}", "reads": ["split"], "seconds": 1.5}
            if name != "base":
                stages[f"train-{stage}"] = {"folder": f"train-{stage}", "reads": ["select"], "seconds": 2.0}
                log = [
                    {"step": n, "loss": 3.0 - n / 10, "forget_weight": n / 40, "negative_prob": 0.3} for n in (5, 10)
                ]
                record = {"device": "cpu", "finished": {"steps": 10, "seconds": 2.0, "log": log}}
                write_json(root / f"train-{stage}" / "model" / "selsft_run.json", record)
    worst = [{"score": -3.0, "row": 7, "before": HOSTILE, "text": "<b>worst", "after": ""}]
    count = int(90 * negative)
    counts = {"rows": 9, "tokens": 99, "trained": 90, "positive": 90 - count, "neutral": 0, "negative": count}
    write_json(root / "select" / COUNTS, counts | {"worst": worst})
    outlook = {
        "score": "influence", "threshold": 1.0, "tokens": 90, "negative": negative, "lowest": -3.0,
        "moved": {"mean": 0.1, "sd": 0.4}, "thresholds": [{"negative_threshold": 1.0, "negative": negative}],
        "edges": [-3.0, -1.0, 1.0], "counts": [9, 81], "judged": {}, "refusal": None,
    }  # fmt: skip
    write_json(root / "select" / OUTLOOK, outlook | more.pop("outlook", {}))
    stages["select"] = {"folder": "select", "reads": [], "seconds": None, "state": "new"}
    if not finished:
        stages = {"select": stages["select"]}
    run = {
        "recipe": HOSTILE, "flags": {"x": HOSTILE}, "stage_flags": {}, "versions": {}, "written": "now", "arms": arms,
        "method": "forget", "overrides": [HOSTILE], "finished": "now" if finished else None, "only_score": False,
    }  # fmt: skip
    write_json(root / "run.json", run | {"stages": stages} | more)
    return root


def test_a_difference_is_of_pairs_and_of_tokens(tmp_path):
    found = results(run_folder(tmp_path))
    nll = next(each for each in found["measures"] if each["name"] == "nll")
    assert found["baseline"] == "plain" and nll["rows"] == 40
    for name, shift in SHIFTS.items():
        if name != "plain":
            effect = nll["differences"][name]
            assert (
                effect["value"] == pytest.approx(shift, abs=0.03) and effect["low"] < effect["value"] < effect["high"]
            )
            # The rows differ by half a nat and the arms by a tenth: only pairs can see it
            assert effect["high"] - effect["low"] < 0.06
    tables = [
        pq.read_table(tmp_path / f"evaluate-{name}-seed0/evaluation" / ROWS).to_pydict()
        for name in ("plain", "forget")
    ]
    ratio = [sum(table["nll"]) / sum(table["tokens"]) for table in tables]
    assert nll["values"]["plain"] == pytest.approx(ratio[0])
    assert nll["differences"]["forget"]["value"] == pytest.approx(ratio[1] - ratio[0])


def test_an_arm_is_traced_to_its_folders(tmp_path):
    arms = {arm["name"]: arm for arm in results(run_folder(tmp_path, seeds=3))["arms"]}
    assert arms["forget"]["folders"] == [f"train-forget-seed{n}" for n in range(3)]
    assert arms["forget"]["evaluations"] == [f"evaluate-forget-seed{n}" for n in range(3)]
    assert all((tmp_path / folder).is_dir() for arm in arms.values() for folder in arm["folders"] + arm["evaluations"])


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({}, "better", "forget is better than plain in negative log-likelihood"),
        ({"shifts": SHIFTS | {"forget": 0.2}}, "worse", "forget is worse than plain"),
        ({"shifts": SHIFTS | {"forget": 0.0}}, "no difference", "No difference was found between forget and plain"),
        ({"negative": 0.0}, "nothing selected", "Nothing was selected. So forget is plain fine-tuning"),
        ({"negative": 0.0, "finished": False}, "nothing selected", "Nothing was selected. Nothing was trained."),
        ({"negative": 0.7, "finished": False, "stopped": "70% are"}, "stopped", "Stopped before training: 70% are."),
        ({"only_score": True, "finished": False}, "scored", "Scored only, nothing was trained"),
        ({"wrong": True}, "no difference", "of right over wrong tokens"),
        ({"headline": "chrf"}, "no difference", "overlap of characters (chrF)"),
    ],
)  # fmt: skip
def test_verdicts(tmp_path, options, kind, words):
    found = results(run_folder(tmp_path, **options))
    if options.get("wrong"):  # marks decide what it is about; half of a shift reaches the gap
        assert found["verdict"]["measure"] == "gap" and words in found["verdict"]["sentence"]
        return
    assert found["verdict"]["kind"] == kind and words in found["verdict"]["sentence"]
    page = write_report(tmp_path, found).read_text()
    assert page.index("Verdict: ") < page.index("<h2>")
    assert ('class="verdict better"' in page) == (kind == "better")
    assert "neutral text -0.0020 nats a token" in found["verdict"]["sentence"] or kind not in ("better",)


def test_nothing_selected_is_never_green(tmp_path, capsys):
    found = results(run_folder(tmp_path, negative=0.0))
    assert next(each for each in found["measures"] if each["name"] == "nll")["differences"]["forget"]["high"] < 0
    assert found["verdict"]["kind"] == "nothing selected"
    assert 'class="good"' not in write_report(tmp_path, found).read_text()
    print_report(found)
    assert "Verdict: Nothing was selected" in capsys.readouterr().out


def test_seeds_are_paired_and_a_control_is_named(tmp_path):
    found = results(run_folder(tmp_path, SHIFTS | {"random": 0.1, "oracle": -0.3}, seeds=3))
    verdict = found["verdict"]
    assert verdict["seeds"] == 3 and "3 seeds" in verdict["sentence"]
    assert {each["arm"]: each["kind"] for each in verdict["controls"]} == {"random": "worse", "oracle": "better"}
    assert not any("One seed" in text for group in found["warnings"] for text in group["texts"])


def test_a_measure_without_resolution_is_left_out_with_its_reason(tmp_path):
    found = results(run_folder(tmp_path))
    assert "exact_match" not in {each["name"] for each in found["measures"]}
    assert {each["name"]: each["reason"] for each in found["left_out"]}["exact_match"].startswith("is 0 for every row")
    assert any(group["cause"] == "Measures left out" for group in found["warnings"])


def test_a_page_with_hostile_text(tmp_path):
    content = results(run_folder(tmp_path))
    content["rows"] = [{"line": 3, "negative": 0.5, "cut": False, "pieces": [[f"a {HOSTILE}", 2], ["<b>bad", -1]]}]
    text = write_report(tmp_path, content).read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and "<script" not in text
    assert not any(c in text for c in "\x00\x1b\u202e\u2066\ufeff")
    assert r"\u202egnp.exe" in text and any(data.startswith("gold <script>") for data in page.texts)
    assert "<mark>&lt;b&gt;worst</mark>" in text and "<mark>&lt;b&gt;bad</mark>" in text
    assert any("why <script>" in data for data in page.texts)
    assert "https://" not in text and "http://" not in text
    assert json.loads((tmp_path / "report.json").read_text())["verdict"]["kind"] == "better"
    assert page.tags.count("th") == sum(each[:2] == ("th", "scope") for each in page.attributes) > 15
    assert page.tags.count("caption") == page.tags.count("table")
    assert page.tags.count("svg") >= 5  # arms, curves, histogram
