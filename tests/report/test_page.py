"""What every page does with text, and that it loads nothing."""

import json
import unicodedata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selsft.evaluation.settings import METRICS, ROWS
from selsft.records import write_json
from selsft.report.page import visible
from selsft.report.run import write_report
from selsft.selection.select import COUNTS
from tests.support.pages import Page

HOSTILE = "<script>alert(1)</script>\x00\x1b[31m\u202egnp.exe\u2066\ufeff</td>"
JOINERS = "\u200c\u200d"
BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI", "BN"}


@pytest.mark.parametrize("text", ["plain\n\ttext", "naïve Ⅳ", "👩‍👩‍👧 ❤️", "שלום עליכם", "\u0e01\u0e33", "𝔘"])
def test_ordinary_text_stays(text):
    assert visible(text) == text


def test_whatever_hides_or_reorders_becomes_an_escape():
    for code in [*range(0x3000), *range(0xFE00, 0x10000), *range(0xE0000, 0xE0080)]:
        c = chr(code)
        kind = unicodedata.category(c)
        control = kind in ("Cc", "Cs", "Zl", "Zp") and c not in "\n\t"
        if control or (unicodedata.bidirectional(c) in BIDI and c not in JOINERS and kind != "Cn"):
            assert visible(c).startswith("\\"), hex(code)
    assert visible("a\x00\u202eb\ud800") == r"a\x00\u202eb\ud800"


def run_folder(root):
    """The files that a report reads, with hostile text wherever a data set's text may be."""
    stages = {}
    for name, right in (("base", [1.0, 0.0, 1.0]), ("trained", [0.0, 1.0, 1.0])):
        folder = root / f"evaluate-{name}" / "evaluation"
        folder.mkdir(parents=True)
        write_json(folder / METRICS, {"exact_match": sum(right) / 3, "nll": 1.0, "lm_eval": {"piqa": {"acc": 0.5}}})
        table = {"row": [0, 1, 2], "tokens": [2, 2, 2], "nll": [1.0, 2.0, 3.0], "exact_match": right}
        table |= {"reference": [f"gold {HOSTILE}"] * 3, "answer": [f"{name} {HOSTILE}", f"{name} b", "same"]}
        pq.write_table(pa.table(table), folder / ROWS)
        stages[f"evaluate-{name}"] = {"folder": f"evaluate-{name}", "reads": ["split"], "seconds": 1.5}
    worst = [{"score": -3.0, "row": 7, "before": HOSTILE, "text": "<b>worst", "after": ""}]
    counts = {"rows": 9, "tokens": 99, "trained": 90, "positive": 80, "neutral": 1, "negative": 9, "worst": worst}
    write_json(root / "select" / COUNTS, counts)
    stages["select"] = {"folder": "select", "reads": [], "seconds": None, "state": "new"}
    run = {"recipe": HOSTILE, "flags": {"x": HOSTILE}, "stage_flags": {}, "versions": {}, "written": "now"}
    write_json(root / "run.json", run | {"stages": stages})
    return root


def test_a_run_with_hostile_text(tmp_path):
    text = write_report(run_folder(tmp_path)).read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and "<script" not in text
    assert not any(c in text for c in "\x00\x1b\u202e\u2066\ufeff")
    assert r"\u202egnp.exe" in text and any(data.startswith("gold <script>") for data in page.texts)
    assert "<mark>&lt;b&gt;worst</mark>" in text and "hidden" not in page.texts
    assert "https://" not in text and "http://" not in text
    # Right to wrong first
    assert text.index("base b") > text.index("base &lt;script")
    assert json.loads((tmp_path / "report.json").read_text())["selections"]["select"]["shares"]["negative"] == 0.1
    assert page.tags.count("th") == sum(each[:2] == ("th", "scope") for each in page.attributes) > 15
    assert page.tags.count("caption") == page.tags.count("table") == 5
