"""`selsft inspect`: the page in a real browser against what Python says, and the same rows on a terminal."""

import json
import os
import statistics
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset, load_dataset
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from selsft import SelectiveSFTConfig
from selsft.cli import main
from selsft.data.chunks import token_chunks
from selsft.data.columns import WEIGHTS
from selsft.data.judged import judged_rows
from selsft.data.tokenizers import special_ids
from selsft.pipeline.results import results
from selsft.report import skills
from selsft.report.inspect import classes, pooled, print_rows, score_names, score_of, write_inspection
from selsft.report.run import write_report
from selsft.report.tokens import LABELLED, ROLE, SCORED, SPECIAL, read_rows
from selsft.selection.weights import add_token_weights, vocabulary
from selsft.skills.results import compute
from tests.pipeline.test_results import run_folder
from tests.support import tiny
from tests.support.browser import CHROMIUM, Tab, chromium
from tests.support.skill_tables import write_study

pytestmark = pytest.mark.slow

AXE = Path(os.environ.get("SELSFT_AXE", ".browser/node_modules/axe-core/axe.min.js"))
HOSTILE = [
    "<script>document.title = 'broken'</script><img src=x onerror=\"document.title = 'broken'\">",
    "</script><script>document.title = 'broken'</script>",
    "plain \u202egnp.exe\u202c and \u2066isolated\u2069 text",
    "null\x00byte \x1b[31mred\x1b[0m \ufeff \u2028 line",
    "שלום עליכם, نص عربي هنا",
    "👩‍👩‍👧 flags 🇩🇪 and ❤️ e\u0301 combining",
    "x" * 10_000,
    "{{ 7 * 7 }} ${1} &lt;b&gt; \\u003cb\\u003e",
]
SETTINGS = {
    "score": "influence", "negative_threshold": 0.5, "neutral_band": 0.0, "score_base_weight": 1.0,
    "protect_special_tokens": True, "positive_fraction": None, "score_pooling": "token", "score_lookahead": 0.0,
    "score_row_worst": None,
}  # fmt: skip
ABOUT = {"title": "a test", "lines": ["policy: tiny"], "total": 9, "judged": [], "measured": {}}


def scored(texts, prompts=None, seed=0, **columns):
    """Rows with random log-probabilities."""
    tok, rng = tiny.tokenizer(), np.random.default_rng(seed)
    prompts = prompts or [""] * len(texts)
    heads, tails = ([tok(text)["input_ids"] for text in some] for some in (prompts, texts))
    ids = [head + tail + [tok.eos_token_id] for head, tail in zip(heads, tails, strict=True)]
    labels = [[-100] * len(head) + row[len(head) :] for head, row in zip(heads, ids, strict=True)]
    logps = {
        name: [(-5 * rng.random(len(row))).astype(np.float32).tolist() for row in ids]
        for name in ("base_logps", "ref_logps")
    }
    return Dataset.from_dict({"input_ids": ids, "labels": labels, **logps, **columns})


def sentences(count):
    return [tiny.sentence(i, 6 + i % 5) for i in range(count)]


def page(path, data, about=ABOUT, **settings):
    rows = read_rows(data, tiny.tokenizer(), 10**7)
    write_inspection(path, rows, {**about, "total": len(data)}, SETTINGS | settings)
    return rows


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with chromium() as tab:
        yield tab


@pytest.fixture
def tab(browser: Tab):
    browser.errors.clear()
    browser.requests.clear()
    browser.opened.clear()
    yield browser
    assert browser.errors == []
    elsewhere = [address for address in browser.requests if not address.startswith("blob:")]  # the exported file
    assert elsewhere == browser.opened


def show(tab, path, **options):
    tab.open(path, **options)
    tab.wait("document.body.dataset.ready === '1'")
    tab.frame()


def coloured(tab, kind="neg"):
    """The tokens of a class in the whole page, by scrolling through it."""
    found, y = set(), 0
    while True:
        tab.js(f"scrollTo(0, {y})")
        tab.frame()
        found |= set(tab.js(f"[...document.querySelectorAll('#list .{kind}')].map(span => +span.dataset.t)"))
        y += 600
        if y > tab.js("document.documentElement.scrollHeight"):
            return found


def move(tab, control, value):
    tab.js(f"$({control!r}).value = {value}; $({control!r}).dispatchEvent(new Event('input'));"
           f"$({control!r}).dispatchEvent(new Event('change'))")  # fmt: skip
    tab.frame()


# ---------------------------------------------------------------- the page against Python


def test_the_tokens_that_the_page_colours_are_those_of_training(tab, tmp_path):
    data = scored(sentences(40), prompts=sentences(40)[::-1], source=["a", "b"] * 20)
    rows = page(tmp_path / "page.html", data)
    show(tab, tmp_path / "page.html")
    args = SelectiveSFTConfig("out", use_cpu=True, bf16=False, score_base_weight=1.0, score_pooling="token")
    score = score_of(rows, "influence")
    for threshold, band in ((0.5, 0.0), (1.25, 0.4), (-0.3, 0.0), (2.0, 1.0)):
        move(tab, "boundary-number", -threshold)
        move(tab, "band-number", band)
        args.negative_threshold, args.neutral_band = threshold, band
        weighted = add_token_weights(data, args, special_ids(tiny.tokenizer()), padding_free=False)
        trained = np.concatenate([chunk.columns[WEIGHTS] for chunk in token_chunks(weighted, [WEIGHTS])])
        ours = classes(rows, score, -threshold, band, True)
        assert np.array_equal(np.where(ours == 2, 0, ours), trained)
        assert int(tab.js("document.body.dataset.negative")) == (trained == -1).sum() > 0
        assert coloured(tab) == set(np.flatnonzero(ours == -1).tolist())
        assert coloured(tab, "neu") == set(np.flatnonzero(ours == 0).tolist()) or band == 0
        settings = tab.js("$('settings').textContent")
        assert f"negative_threshold: {threshold:g}" in settings and "score_pooling: token" in settings
    shares = tab.js("[...document.querySelectorAll('#sources tr')].map(row => row.innerText.split('\\t'))")
    for source, count, negative, _ in shares:
        own = np.repeat([name == source for name in data["source"]], np.diff(rows.offsets))
        assert (int(count), int(negative)) == (20, (ours[own] == -1).sum())


def trained_classes(data, **settings):
    """Token weights of training, and which tokens the rule made negative."""
    args = SelectiveSFTConfig("out", use_cpu=True, bf16=False, **settings)
    special, words = vocabulary(tiny.tokenizer(), args)
    weighted = add_token_weights(data, args, special, padding_free=False, words=words)
    return np.concatenate([chunk.columns[WEIGHTS] for chunk in token_chunks(weighted, [WEIGHTS])])


def yaml_settings(tab):
    return yaml.safe_load(tab.js("$('settings').textContent"))


def test_pooled_classes_are_those_of_training(tab, tmp_path):
    """Every pooling, by share and by threshold, and the settings that the page says give the same weights."""
    texts = ["one, two-three don't four4 naïve 👩‍👩‍👧 שלום", *sentences(30)]
    data = scored(texts, prompts=["", *sentences(30)[::-1]])
    page(tmp_path / "page.html", data, score_base_weight=0.5, score_lookahead=0.3, score_row_worst=3)
    show(tab, tmp_path / "page.html")
    fixed = {"score_base_weight": 0.5, "score_lookahead": 0.3, "score_row_worst": 3}
    for pooling in ("token", "word", "word_sum", "span", "row"):
        move(tab, "pooling", f"'{pooling}'")
        for control, value in (("share", 20), ("boundary-number", -1.25)):
            move(tab, control, value)
            rule = {"positive_fraction": 0.8} if control == "share" else {"negative_threshold": 1.25}
            own = {**fixed, "score_row_worst": 3 if pooling == "row" else None}
            trained = trained_classes(data, score_pooling=pooling, **rule, **own)
            assert int(tab.js("document.body.dataset.negative")) == (trained == -1).sum() > 0, (pooling, rule)
            assert tab.js("[...classOf].map(c => c === 2 ? 0 : c)") == trained.tolist(), (pooling, rule)
            said = yaml_settings(tab)
            assert (trained_classes(data, **said) == trained).all() and rule.items() <= said.items()


def test_a_page_begins_with_the_classes_of_a_default_run(tab, tmp_path, capsys):
    """`inspect FOLDER` and `train --dataset_name FOLDER`, neither with another flag."""
    data = scored(sentences(40), prompts=sentences(40)[::-1])
    tiny.tokenizer().save_pretrained(str(tmp_path / "model"))
    data.save_to_disk(str(tmp_path / "scored"))
    argv = [str(tmp_path / "scored"), "--model_name_or_path", str(tmp_path / "model"), "--text"]
    assert main(["inspect", *argv, "--output", str(tmp_path / "page.html")]) == 0
    trained = trained_classes(data)
    assert f"{(trained == -1).sum()} of {(trained != 0).sum()} scored" in capsys.readouterr().out
    show(tab, tmp_path / "page.html")
    assert coloured(tab) == set(np.flatnonzero(trained == -1).tolist()) != set()
    said = yaml_settings(tab)
    assert said == {"score": "influence", "score_pooling": "word_sum", "score_base_weight": 0.5,
                    "positive_fraction": 0.95, "neutral_band": 0}  # fmt: skip


def test_rows_are_sorted_filtered_and_searched(tab, tmp_path):
    data = scored(sentences(30), id=[f"row-{i}" for i in range(30)], source=["x", "y", "z"] * 10)
    rows = page(tmp_path / "page.html", data)
    show(tab, tmp_path / "page.html")
    found = classes(rows, score_of(rows, "influence"), -0.5, 0.0, True)
    parts = np.split(found, rows.offsets[1:-1])
    share = [-(part == -1).sum() / (part != 2).sum() for part in parts]
    move(tab, "sort", "'share'")
    assert tab.js("order") == sorted(range(30), key=lambda row: (share[row], row))
    boundary, score = np.float32(-0.5), score_of(rows, "influence")
    worst = []
    for part, values in zip(parts, np.split(score, rows.offsets[1:-1]), strict=True):
        sums = [
            sum(float(v - boundary) for v, c in zip(values[a:b], part[a:b], strict=True))
            for a in range(len(part)) for b in range(a + 1, len(part) + 1) if (part[a:b] != 2).all()
        ]  # fmt: skip
        worst.append(min(sums))
    move(tab, "sort", "'span'")
    assert [worst[row] for row in tab.js("order")] == sorted(worst)
    tab.js("$('search').value = 'ROW-17'; $('search').dispatchEvent(new Event('input'))")
    tab.wait("order.length === 1")
    assert tab.js("order") == [17] and "row-17" in tab.js("document.querySelector('#list article').innerText")
    tab.js("$('search').value = ''; $('search').dispatchEvent(new Event('input'))")
    tab.wait("order.length === 30")
    move(tab, "facet", "JSON.stringify(['source', 'y'])")
    assert sorted(tab.js("order")) == list(range(1, 30, 3))


def test_frequent_negative_words(tab, tmp_path):
    data = scored(["one two three. one two", "two, three two"])
    rows = page(tmp_path / "page.html", data, negative_threshold=-9.0)  # every token is negative
    show(tab, tmp_path / "page.html")
    tab.js("$('words-box').open = true")
    tab.wait("document.querySelectorAll('#words tr').length > 0")
    words = {word: (int(count), int(of)) for word, count, of, _ in tab.js(
        "[...document.querySelectorAll('#words tr')].map(row => row.innerText.split('\\t'))")}  # fmt: skip
    # A word counts where one of its tokens is scored; the first "one" has a first token without a past and others
    assert words["two"] == (4, 4) and words["three"] == (2, 2) and words[","] == (1, 1)
    assert rows.text(0, rows.offsets[1]).startswith("one two three.")


def test_a_token_says_what_it_is(tab, tmp_path):
    rows = page(tmp_path / "page.html", scored(["alpha beta gamma"]))
    show(tab, tmp_path / "page.html")
    x, y = tab.js("(() => { const b = document.querySelector('[data-t=\"2\"]').getBoundingClientRect();"
                  "return [b.left + b.width / 2, b.top + b.height / 2]; })()")  # fmt: skip
    tab.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    tab.wait("!$('tip').hidden")
    said = tab.js("$('tip').innerText").replace("−", "-")
    assert f"{rows.scores['base_logps'][2]:.2f}" in said and f"{rows.scores['ref_logps'][2]:.2f}" in said
    assert f"{score_of(rows, 'influence')[2]:.3f}" in said
    assert json.dumps(rows.pieces[rows.tokens[2]]) in said


# ---------------------------------------------------------------- marking


def test_marks_become_a_judged_sample(tab, tmp_path):
    texts, prompts = sentences(8), sentences(16)[8:]
    texts[1] = "naïve 👩‍👩‍👧 café שלום end"
    data = scored(texts, prompts, id=[f"row-{i}" for i in range(8)])
    rows = page(tmp_path / "page.html", data)
    show(tab, tmp_path / "page.html")
    starts = rows.offsets

    def tokens_of(row, word):
        """Tokens of a word of a row's completion."""
        begin = next(t for t in range(starts[row], starts[row + 1]) if rows.flags[t] & LABELLED)
        place, at = rows.text(begin, starts[row + 1]).index(word), 0
        own = []
        for t in range(begin, starts[row + 1]):
            end = at + len(rows.pieces[rows.tokens[t]])
            if (at < place + len(word) and end > place) or (at == end and own and place < at <= place + len(word)):
                own.append(t)
            at = end
        return own

    # With the mouse: from the middle of one word to the middle of the next
    words = texts[0].split()[2:4]
    ends = [tokens_of(0, words[0])[0], tokens_of(0, words[1])[-1]]
    at = [
        tab.js(f"(() => {{ const b = document.querySelector('[data-t=\"{t}\"]').getBoundingClientRect();"
               "return [b.left + b.width / 2, b.top + b.height / 2]; })()")
        for t in ends
    ]  # fmt: skip
    tab.drag(tuple(at[0]), tuple(at[1]))
    tab.wait("!$('menu').hidden")
    tab.click("#menu [value=wrong]")
    # The ends of a selection may lie in spaces, which belong to no token
    picked, expected = tab.js(
        "(() => { const spaces = [...document.querySelectorAll('#list .tokens')].map(text => [...text.childNodes]"
        ".filter(node => node.nodeType === 3)).find(found => found.length > 1), range = new Range();"
        "range.setStart(spaces[0], 0); range.setEnd(spaces[1], 1);"
        "return [pick(range), [+spaces[0].nextSibling.dataset.t, +spaces[1].previousSibling.dataset.t]]; })()"
    )
    assert picked == expected
    # With the keyboard: the emoji and the word behind it
    target = tokens_of(1, "👩‍👩‍👧")
    tab.js("document.querySelectorAll('#list .tokens')[1].focus({focusVisible: true})")
    tab.key("Home")
    while tab.js("cursor") < target[0]:
        tab.key("ArrowRight")
    while tab.js("cursor") < tokens_of(1, "café")[0]:
        tab.key("ArrowRight", shift=True)
    tab.key("w")
    # A word that nobody can judge, a prompt that cannot be marked, and a row that is clean
    tab.key("End")
    tab.key("ArrowLeft")
    tab.key("u")
    tab.key("Home")
    tab.key("w")
    assert "no label" in tab.js("$('said').textContent")
    tab.js("document.querySelectorAll('#list .tokens')[2].focus({focusVisible: true})")
    tab.key("c")
    tab.frame()
    wrong = coloured(tab, "wrong")
    assert wrong == {*range(ends[0], ends[1] + 1), *tokens_of(1, "👩‍👩‍👧 café")}

    tab.js("scrollTo(0, 0)")
    tab.click("#export")
    tab.wait(lambda: (tab.downloads / "judged.jsonl").is_file())
    lines = [json.loads(line) for line in (tab.downloads / "judged.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == ["row-0", "row-1", "row-2"] and [line["row"] for line in lines] == [
        0,
        1,
        2,
    ]
    assert [(line["prompt"], line["completion"]) for line in lines] == list(zip(prompts[:3], texts[:3], strict=True))
    said = [[(line["completion"][a:b], weight) for a, b, weight in line["spans"]] for line in lines]
    assert said == [[(" ".join(words), -1)], [("👩‍👩‍👧 café", -1), ("end", 0)], []]

    # What selsft reads from the file are the tokens that were marked
    (tmp_path / "judged.jsonl").write_bytes((tab.downloads / "judged.jsonl").read_bytes())
    args = SelectiveSFTConfig("out", use_cpu=True, bf16=False, max_length=None)
    sample = judged_rows(
        load_dataset("json", data_files=str(tmp_path / "judged.jsonl"), split="train"), tiny.tokenizer(), args
    )
    assert np.array_equal(sample.input_ids, np.concatenate(data["input_ids"][:3]))
    assert set(np.flatnonzero(sample.wrong == 1).tolist()) == wrong
    known = {t for t in range(starts[3]) if rows.flags[t] & SCORED and not rows.flags[t] & SPECIAL}
    assert set(np.flatnonzero(sample.wrong >= 0).tolist()) == known - set(tokens_of(1, "end"))

    # Marks are still there after a reload; without them, the file brings them back
    show(tab, tmp_path / "page.html")
    assert coloured(tab, "wrong") == wrong
    tab.js("localStorage.clear()")
    show(tab, tmp_path / "page.html")
    assert coloured(tab, "wrong") == set()
    tab.js("localStorage.clear()")
    about = {**ABOUT, "judged": lines}
    page(tmp_path / "page.html", data, about)
    show(tab, tmp_path / "page.html")
    assert coloured(tab, "wrong") == wrong
    assert tab.js("[...marks]") == [[0, tab.js("marks.get(0)")], [1, tab.js("marks.get(1)")], [2, []]]
    tab.js("localStorage.clear()")


def test_a_conversation_is_exported_as_one_text(tab, tmp_path):
    tok = tiny.tokenizer()
    messages = tiny.chat_data(2)["messages"]
    made = [tok.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True) for chat in messages]
    ids = [one["input_ids"] for one in made]
    masks = [one["assistant_masks"] for one in made]
    data = Dataset.from_dict(
        {"input_ids": ids, "assistant_masks": masks, "token_scores": [[-1.0] * len(i) for i in ids]}
    )
    rows = page(tmp_path / "page.html", data, score="token_scores")
    show(tab, tmp_path / "page.html")
    roles = [rows.text(t, t + 1) for t in np.flatnonzero(rows.flags & ROLE)]
    assert "".join(roles[: len(roles) // 2]) == "userassistantuserassistant"
    answer = int(np.flatnonzero((rows.flags & LABELLED > 0) & (rows.flags & SPECIAL == 0))[0])
    tab.js(f"mark(...wholeWords({answer}, {answer} + 1), -1)")
    record = tab.js("judgedRow(0, true)")
    assert record["text"] == tok.decode(ids[0])
    word = messages[0][1]["content"].split()[0]
    (wrong,) = [record["text"][a:b] for a, b, weight in record["spans"] if weight == -1]
    assert wrong == word
    unknown = "".join(record["text"][a:b] for a, b, weight in record["spans"] if weight == 0)
    for message in messages[0]:
        assert (message["content"] in unknown) == (message["role"] == "user")
    tab.js("localStorage.clear()")


def test_precision_and_recall_at_the_slider(tab, tmp_path):
    data = scored(sentences(40))
    rows = read_rows(data, tiny.tokenizer(), 10**7)
    score = score_of(rows, "influence")
    judged = []
    for row in range(40):
        text = data_text = tiny.tokenizer().decode(data["input_ids"][row][:-1])
        words = [(m, m + len(w)) for w in data_text.split() for m in [text.index(w)]]
        judged.append({"text": text, "spans": [[*span, -1] for span in words[row % 3 :: 3]]})
    page(tmp_path / "page.html", data, {**ABOUT, "judged": judged})
    show(tab, tmp_path / "page.html")
    assert "40 judged rows are shown" in tab.js("$('said').textContent")
    found = classes(rows, score, -0.5, 0.0, True)
    wrong = np.array(tab.js("Array.from(judged)"))
    known = (found != 2) & (wrong != 0)
    hits = ((found == -1) & (wrong < 0) & known).sum()
    precision = hits / ((found == -1) & known).sum()
    recall = hits / ((wrong < 0) & known).sum()
    assert float(tab.js("document.body.dataset.precision")) == pytest.approx(precision)
    assert float(tab.js("document.body.dataset.recall")) == pytest.approx(recall)
    fair = known & (rows.flags & SPECIAL == 0)
    bad, good = score[fair & (wrong < 0)], score[fair & (wrong > 0)]
    auc = ((bad[:, None] < good).mean() + 0.5 * (bad[:, None] == good).mean()).item()
    assert tab.js("precisionCurve().auc") == pytest.approx(auc, abs=1e-9)
    wanted = round(float((wrong[fair] < 0).mean()) + 0.02, 2)
    tab.js(f"$('target').value = {wanted}; $('target-use').click()")
    chosen = float(tab.js("state.boundary"))
    at = fair & (score < np.float32(chosen))
    assert (wrong[at] < 0).mean() >= wanted - 0.01
    tab.js("$('target').value = 1.5; $('target-use').click()")
    assert "No threshold reaches 1.50" in tab.js("$('target-said').textContent")


# ---------------------------------------------------------------- safe, accessible, fluid


def test_hostile_text_stays_text(tab, tmp_path):
    data = scored(HOSTILE, id=[text[:300] for text in HOSTILE])
    judged = [{"text": HOSTILE[0], "spans": [[0, 8, HOSTILE[0]]]}]
    about = {**ABOUT, "title": HOSTILE[0] + HOSTILE[2], "lines": HOSTILE, "judged": judged}
    about["measured"] = {"judged": {HOSTILE[1]: {"token": {"auc": 0.5}}}}
    page(tmp_path / "page.html", data, about)
    show(tab, tmp_path / "page.html")
    assert tab.js("document.title").startswith("Tokens of <script>")
    assert tab.js("document.querySelectorAll('img, iframe, #list script').length") == 0
    for row, text in enumerate(HOSTILE):
        tab.js(f"state.query = 'row'; order = [{row}]; itemRow = [{row}]; itemStart = [offsets[{row}]];"
               "for (const made of live.values()) made.remove(); live.clear(); estimate()")  # fmt: skip
        tab.frame()
        shown = tab.js("document.querySelector('#list .tokens').innerText")
        assert not set("\x00\x1b\u202e\u202c\u2066\u2069\ufeff\u2028") & set(shown)
        plain = text.replace("x" * 10_000, "")
        for piece in plain.split(" ")[:2]:
            if piece.isprintable():
                assert piece in shown, (piece, shown)
        assert tab.js("document.documentElement.scrollWidth <= innerWidth"), text[:50]
    assert r"\u202egnp.exe" in tab.js("visible('\\u202egnp.exe')") and r"\x00" in tab.js("visible('\\u0000')")


@pytest.mark.slow
@pytest.mark.skipif(not AXE.is_file(), reason="no axe-core: npm install --prefix .browser axe-core")
@pytest.mark.parametrize("name", ["inspect", "run", "skills"])
def test_no_serious_accessibility_violation(tab, tmp_path, name):
    if name == "inspect":
        judged = [{"text": tiny.sentence(0, 6), "spans": [[0, 4]]}]
        measured = {"test": {"probe": {"token": {"auc": 0.9, "auc_low": 0.8, "auc_high": 0.95, "ap": 0.5}}}}
        data = scored(sentences(12), source=["a", "b"] * 6)
        page(tmp_path / "report.html", data, {**ABOUT, "judged": judged, "measured": measured}, neutral_band=0.2)
    elif name == "run":
        write_report(tmp_path, results(run_folder(tmp_path)))
    else:
        skills.write_report(tmp_path, compute(write_study(tmp_path, hidden=False)))
    axe = AXE.read_text(encoding="utf-8")
    for width, dark in ((1280, False), (1280, True), (390, False)):
        tab.open(tmp_path / "report.html", width=width, dark=dark)
        tab.frame()
        tab.js(f"{axe}; for (const box of document.querySelectorAll('details')) box.open = true; 0")
        tab.frame()
        found = tab.js(
            "axe.run().then(r => [r.passes.length, r.violations.map(v => [v.id, v.impact, v.nodes[0].html])])"
        )
        assert found[0] > 20
        assert [each for each in found[1] if each[1] in ("serious", "critical")] == [], (width, dark)
        assert tab.js("document.documentElement.scrollWidth <= innerWidth + 1"), width
    tab.js("localStorage.clear()")


@pytest.mark.slow
def test_100_000_tokens_stay_fluid(tab, tmp_path):
    rng = np.random.default_rng(0)
    tok = tiny.tokenizer()
    ids = [rng.integers(4, len(tok), 200).tolist() for _ in range(500)]
    logps = {name: [(-rng.random(200) * 5).tolist() for _ in ids] for name in ("base_logps", "ref_logps")}
    page(tmp_path / "page.html", Dataset.from_dict({"input_ids": ids, "labels": ids, **logps}))
    show(tab, tmp_path / "page.html")
    times = tab.js(
        "(async () => { const found = []; for (let i = 0; i < 9; i++) { const start = performance.now();"
        "$('boundary').value = -1 - i / 10; $('boundary').dispatchEvent(new Event('input'));"
        "document.body.getBoundingClientRect(); found.push(performance.now() - start);"
        "await new Promise(done => requestAnimationFrame(done)); } return found; })()"
    )
    assert statistics.median(times) < 100, times
    assert tab.js("document.querySelectorAll('#list [data-t]').length") < 6000
    tab.js("scrollTo(0, document.documentElement.scrollHeight)")
    tab.frame()
    assert tab.js("[...live.keys()].includes(itemRow.length - 1)")


# ---------------------------------------------------------------- texts of tokens


def metaspace():
    """In the manner of SentencePiece: a space in front, bytes for what the vocabulary lacks."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ])  # fmt: skip
    special = ["<unk>", "<s>", "</s>", *[f"<0x{value:02X}>" for value in range(256)]]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([f"{a} {b}" for a in tiny.WORDS for b in tiny.WORDS], trainer)
    plain = json.loads(tokenizer.to_str())
    plain["added_tokens"] = plain["added_tokens"][:3]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(plain)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator([" ".join(tiny.WORDS)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[SEP]")


@pytest.mark.parametrize("make", [tiny.tokenizer, metaspace, wordpiece])
def test_the_texts_of_tokens_make_the_text(make):
    tok = make()
    texts = ["alpha beta", "alpha gamma delta alpha", "eta kappa"]
    if make is not wordpiece:
        texts += ["naïve 👩‍👩‍👧 🇩🇪", "🤖🤖 שלום", "日本", "e\u0301 \x00"]
    ids = [tok(text)["input_ids"] for text in texts]
    rows = read_rows(Dataset.from_dict({"input_ids": ids}), tok, 10**6)
    for row, text in enumerate(texts):
        assert rows.text(*rows.offsets[row : row + 2]) == text
    # A character that several tokens make lies with the first of them
    if make is not wordpiece:
        emoji = [rows.pieces[token] for token in rows.tokens[rows.offsets[4] : rows.offsets[5]]]
        assert [piece.strip() for piece in emoji if "🤖" in piece] == ["🤖", "🤖"] and emoji.count("") >= 6


def test_a_character_that_was_cut_off():
    tok = tiny.tokenizer()
    ids = tok("a 👩")["input_ids"]
    rows = read_rows(Dataset.from_dict({"input_ids": [ids[:-1], ids]}), tok, 10**6)
    assert rows.text(0, len(ids) - 1) == tok.decode(ids[:-1]) and rows.text(len(ids) - 1, 2 * len(ids) - 1) == "a 👩"


def test_what_a_token_is():
    data = scored(["beta gamma"], ["alpha "])
    rows = read_rows(data, tiny.tokenizer(), 10**6)
    labelled = np.array(data["labels"][0]) != -100
    assert np.array_equal(rows.flags & LABELLED > 0, labelled) and np.array_equal(rows.flags & SCORED > 0, labelled)
    assert rows.flags[-1] & SPECIAL and not (rows.flags[:-1] & SPECIAL).any()
    packed = read_rows(
        data.remove_columns("labels").add_column("seq_lengths", [[3, len(labelled) - 3]]), tiny.tokenizer(), 9**9
    )
    assert np.flatnonzero(packed.flags & SCORED == 0).tolist() == [0, 3]


def test_a_random_draw_of_many_rows():
    data = scored(sentences(50), id=list(range(50)))
    rows = read_rows(data, tiny.tokenizer(), 100)
    assert 0 < rows.offsets[-1] <= 100 and rows.numbers.tolist() == sorted(rows.facts["id"]) == rows.facts["id"]
    for place, number in enumerate(rows.numbers):
        start, end = rows.offsets[place : place + 2]
        assert rows.text(start, end) == tiny.tokenizer().decode(data["input_ids"][number])
        assert np.array_equal(rows.scores["ref_logps"][start:end], np.float32(data["ref_logps"][number]))


# ---------------------------------------------------------------- the command


@pytest.fixture
def saved(tmp_path):
    data = scored(sentences(12), id=[f"row-{i}" for i in range(12)])
    data.save_to_disk(str(tmp_path / "rows"))
    tiny.tokenizer().save_pretrained(str(tmp_path / "model"))
    return data, str(tmp_path / "rows"), ["--model_name_or_path", str(tmp_path / "model")]


def test_the_command_writes_a_page_and_prints_rows(saved, tmp_path, capsys):
    data, folder, model = saved
    output = tmp_path / "made" / "page.html"
    assert (
        main(
            [
                "inspect",
                folder,
                *model,
                "--output",
                str(output),
                "--text",
                "--rows",
                "2",
                "--negative_threshold",
                "0.5",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    rows = read_rows(data, tiny.tokenizer(), 10**6)
    score = pooled(rows, score_of(rows, "influence", 0.5), "word_sum")
    found = classes(rows, score, -0.5, 0.0, True)
    assert f"{(found == -1).sum()} of {(found != 2).sum()} scored tokens are negative" in said
    assert said.count("id row-") == 2 and f"Page: {output}" in said and output.stat().st_size > 20_000
    share = [(part == -1).sum() / (part != 2).sum() for part in np.split(found, rows.offsets[1:-1])]
    first = int(np.argmax(share))
    assert f"row {first} " in said and said.index(f"id row-{first}") == said.index("id row-")


def test_a_folder_of_selsft_score_needs_no_other_flag(tmp_path, capsys):
    for seed, name in enumerate(("model", "reference")):
        tiny.llama(seed).save_pretrained(str(tmp_path / name))
        tiny.tokenizer().save_pretrained(str(tmp_path / name))
    tiny.prompt_data(12).to_json(str(tmp_path / "data.jsonl"))
    flags = {"model_name_or_path": "model", "reference_model": "reference", "dataset_name": "data.jsonl"}
    given = [part for key, value in flags.items() for part in (f"--{key}", str(tmp_path / value))]
    folder = str(tmp_path / "scored")
    assert main(["score", *given, "--scored_dir", folder, "--use_cpu", "true", "--bf16", "false"]) == 0
    assert main(["inspect", folder, "--output", str(tmp_path / "page.html"), "--text"]) == 0
    assert "scored tokens are negative" in capsys.readouterr().out
    assert f"policy: {tmp_path / 'model'}" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_terminal_gets_no_control_characters(capsys):
    rows = read_rows(scored(["\x1b[31mred \u202e x", "[bold]markup[/bold]"]), tiny.tokenizer(), 10**6)
    found = np.where(rows.flags & SCORED > 0, -1, 2).astype(np.int8)
    console = Console(width=200, color_system=None, markup=False, highlight=False)
    print_rows(rows, found, 5, console)
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\u202e" not in said and r"\x1b" in said and r"\u202e" in said
    assert "bold" in said.replace("[", "").replace("]", "")


def test_rows_of_other_tools(tmp_path, capsys):
    tok = tiny.tokenizer()
    ids = [tok(text)["input_ids"] for text in sentences(6)]
    masked = Dataset.from_dict({"input_ids": ids, "completion_mask": [[0, 0] + [1] * (len(row) - 2) for row in ids]})
    rows = read_rows(masked, tok, 10**6)
    assert score_names(rows) == ["weights"] and (rows.flags & LABELLED > 0).sum() == sum(map(len, ids)) - 12
    weights = [[1.0, 0.0, -1.0, *[1.0] * (len(row) - 3)] for row in ids]
    weighted = masked.remove_columns("completion_mask").add_column("token_weights", weights)
    rows = read_rows(weighted, tok, 10**6)
    found = classes(rows, score_of(rows, "weights"), 0.0, 0.0, False)
    assert (found == -1).sum() == 6 and score_names(rows) == ["weights"]
    probe = weighted.add_column("probe", weights).add_column("base_logps", weights)
    assert score_names(read_rows(probe, tok, 10**6)) == ["probe", "base_logps", "weights"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["ROWS"], "--output is missing"),
        (["ROWS", "--text", "--rows", "0"], "rows=0 must be at least 1"),
        (["ROWS", "--text", "--score", "nope"], "--score nope: the rows have influence, base_logps, ref_logps"),
        (["ROWS", "--text", "--judged", "nope.jsonl"], "judged='nope.jsonl': no such file"),
        (["ROWS", "--text", "--judged", "BAD"], "line 2 is not JSON"),
        (["/nowhere/at/all", "--text"], "/nowhere/at/all"),
        (["ROWS", "--text", "--nope"], "unrecognized arguments: --nope"),
        (["TEXTS", "--text"], "no 'input_ids': give a folder of `selsft score`"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(saved, tmp_path, capsys, flags, message):
    _, folder, model = saved
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "spans": []}\n{nope\n')
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n')
    names = {"ROWS": folder, "BAD": str(tmp_path / "bad.jsonl"), "TEXTS": str(tmp_path / "texts.jsonl")}
    assert main(["inspect", *[names.get(flag, flag) for flag in flags], *model]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("selsft inspect: error: ") and error.count("\n") == 1


def test_a_tokenizer_that_does_not_fit(saved, tmp_path, capsys):
    _, folder, _ = saved
    assert main(["inspect", folder, "--text"]) == 2
    assert "model_name_or_path is missing" in capsys.readouterr().err
    wordpiece().save_pretrained(str(tmp_path / "small"))
    assert main(["inspect", folder, "--text", "--model_name_or_path", str(tmp_path / "small")]) == 2
    assert "and the tokenizer" in capsys.readouterr().err
