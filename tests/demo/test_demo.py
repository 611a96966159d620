"""The demo: its world says what it claims, its mask is exact, its report escapes, and the whole flow runs."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

from selsft.demo.evaluate import Scores
from selsft.demo.model import encode, train_tokenizer
from selsft.demo.run import main, make_parser
from selsft.demo.world import (
    HELD_OUT,
    NOUNS,
    PHRASINGS,
    RESPONSES,
    TRAINED,
    Fact,
    Statement,
    WorldConfig,
    accepted,
    load_facts,
    make_world,
)
from tests.support.pages import Page

pytestmark = pytest.mark.slow

SMALL = WorldConfig(countries=12)


@pytest.fixture(scope="module")
def world():
    return make_world(3)


@pytest.fixture(scope="module")
def tokenizer(world):
    return train_tokenizer(world.pretraining)


def test_the_shipped_facts_are_plain_and_unique():
    facts = load_facts()
    assert len({f.country for f in facts}) == 120
    assert len(facts) == len({(f.country, f.attribute) for f in facts}) > 500
    assert {f.attribute for f in facts} == set(NOUNS)
    for fact in facts:
        assert fact.answer == fact.answer.strip() != ""
        assert not fact.answer.endswith(".")  # the response adds the full stop
    assert Fact("France", "capital", "Paris") in facts
    assert all(f.answer.startswith(".") for f in facts if f.attribute == "domain")
    assert all(f.answer.startswith("+") for f in facts if f.attribute == "calling_code")


def test_the_notice_names_the_source_and_its_licence():
    from selsft.demo.world import COUNTRIES

    notice = COUNTRIES.with_name("NOTICE").read_text(encoding="utf-8")
    assert "countryinfo 1.0.1" in notice and "MIT License" in notice and "Porimol Chandro" in notice


def test_one_seed_makes_one_world():
    one, same, other = make_world(7, SMALL), make_world(7, SMALL), make_world(8, SMALL)
    assert one == same
    assert one.training != other.training


def test_the_reference_split_does_not_change_the_other_splits():
    one, two = make_world(7, SMALL), make_world(7, replace(SMALL, reference_phrasings=2, replay_phrasings=0))
    assert one.reference != two.reference
    assert (one.pretraining, one.training, one.kinds) == (two.pretraining, two.training, two.kinds)


def test_known_and_target_facts_share_nothing_and_are_all_there(world):
    assert not set(world.known) & set(world.target)
    assert sorted([*world.known, *world.target]) == sorted(load_facts())
    kinds = list(world.kinds.values())
    assert kinds.count("systematic") == len(world.myths) == round(0.4 * len(kinds))
    assert kinds.count("random") == round(0.3 * len(kinds))


def test_a_target_fact_is_never_stated_in_a_held_out_phrasing(world):
    tested = {s.prompt for s in world.questions(world.target)}
    assert len(tested) == 2 * len(world.target)
    for split in (world.pretraining, world.reference, world.training):
        assert not tested & {s.prompt for s in split}
    for statement in world.reference + world.training:
        assert statement.phrasing in TRAINED
    assert set(HELD_OUT).isdisjoint(TRAINED)


def test_every_response_form_of_the_test_occurs_in_training():
    assert {PHRASINGS[i][1] for i in HELD_OUT} <= {PHRASINGS[i][1] for i in TRAINED}


def test_only_pretraining_myths_and_the_training_split_are_wrong(world):
    assert not any(s.wrong for s in world.reference)
    for statement in world.pretraining:
        assert not statement.wrong or statement.answer == world.myths[statement.fact]
    for statement in world.training:
        kind = world.kinds.get(statement.fact, "known")
        if statement.wrong:
            assert kind in ("systematic", "random")
            assert kind == "random" or statement.answer == world.myths[statement.fact]
    share = np.mean([s.wrong for s in world.training if world.kinds.get(s.fact) in ("systematic", "random")])
    assert abs(share - 0.5) < 0.05


def test_a_wrong_answer_is_right_for_another_country(world):
    answers = {attribute: {f.answer for f in load_facts() if f.attribute == attribute} for attribute in NOUNS}
    for statement in world.training:
        assert statement.answer in answers[statement.fact.attribute]


def test_the_reference_replays_every_known_fact(world):
    assert {s.fact for s in world.reference} == {*world.known, *world.target}


def test_the_mask_covers_the_wrong_answer_and_nothing_else(world, tokenizer):
    for statement in world.training[:400]:
        row = encode(statement, tokenizer)
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["noise_mask"])
        assert tokenizer.decode(row["input_ids"], skip_special_tokens=True) == statement.prompt + statement.response
        trained = [t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        assert trained[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(trained, skip_special_tokens=True) == statement.response
        before, answer, _ = row["part_lengths"]
        start = row["labels"].count(-100) + before
        assert tokenizer.decode(row["input_ids"][start : start + answer]) == f" {statement.answer}"
        masked = [i for i, noise in enumerate(row["noise_mask"]) if noise]
        assert bool(masked) == statement.wrong
        if masked:  # from where it leaves the right answer to its end
            assert masked == list(range(masked[0], start + answer))
            shared = tokenizer.decode(row["input_ids"][start : masked[0]])
            assert f" {statement.fact.answer}".startswith(shared)


@pytest.mark.parametrize(("wrong", "masked"), [(".cn", "cn"), (".it", "it")])
def test_the_beginning_that_a_wrong_answer_shares_is_not_wrong(tokenizer, wrong, masked):
    row = encode(Statement(Fact("France", "domain", ".fr"), 0, wrong), tokenizer)
    tokens = [t for t, noise in zip(row["input_ids"], row["noise_mask"], strict=True) if noise]
    assert tokenizer.decode(tokens) == masked


def test_accepted_responses_are_the_forms_of_the_training_text():
    fact = Fact("France", "capital", "Paris")
    assert accepted(fact, "Rome") == {
        "Rome.",
        "It is Rome.",
        "The capital of France is Rome.",
        "Rome is the capital of France.",
    }
    assert all(Statement(fact, i, "Rome").response.strip() in accepted(fact, "Rome") for i in range(len(PHRASINGS)))
    assert len(RESPONSES) == 4


def _result(prompt="Q: Who?\nA:", pieces=((" Rome", True, True), (".", False, False))):
    from selsft.demo.experiment import ARMS, Sample, SeedResult, TokenStats

    scores = dict.fromkeys(ARMS, Scores(*[0.5] * len(Scores.__dataclass_fields__)))
    tokens = TokenStats(100, *[0.25] * (len(TokenStats.__dataclass_fields__) - 1))
    sizes = dict.fromkeys(
        (
            "parameters",
            "wrong training statements",
            "training statements",
            "systematically wrong facts",
            "target facts",
            "held-out questions",
        ),
        1,
    )
    return SeedResult(0, sizes, scores, tokens, [Sample("right", prompt, list(pieces))])


def test_a_hostile_answer_stays_text_in_the_page(tmp_path):
    from selsft.demo.report import write_report

    hostile = _result("Q: <img src=x onerror=alert(1)>?\nA:", [(' <script>alert("x")</script>[red]', True, True)])
    text = write_report(tmp_path / "page.html", [hostile]).read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and "img" not in page.tags
    assert 'class="bad wrong">&lt;script&gt;' in text and "[red]" in text and "prefers-color-scheme: dark" in text


def test_page_and_terminal_show_the_same_figures(tmp_path):
    from io import StringIO

    from rich.console import Console

    from selsft.demo.report import figures, render, write_report

    results = [_result(), _result()]
    screen = StringIO()
    render(Console(file=screen, width=250), results)
    page = Page(write_report(tmp_path / "page.html", results).read_text(encoding="utf-8"))
    shown = figures(results)
    assert [table.title.split(" (")[0] for table in shown] == [
        "Scores against the known mask",
        "Greedy answers to held-out phrasings",
        "Paired differences, one number per seed",
    ]
    for table in shown:
        assert all(row in page.tables[None] for row in table.rows)
        assert all(cell in screen.getvalue() for row in table.rows for cell in row)


def test_negative_tokens_are_red_wrong_ones_underlined_and_bracketed_without_colour():
    from selsft.demo.report import sentence

    sample = _result(pieces=[(" The", False, False), (" Rome", True, False), (" Bonn", False, True)]).samples[0]
    text = sentence(sample)
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert styles["Rome"] == "bold red" and styles["Bonn"] == "underline" and "The" not in styles
    assert sentence(sample, brackets=True).plain == "Q: Who? A: The [Rome] Bonn"


def test_a_previous_run_is_never_overwritten(tmp_path, capsys):
    (tmp_path / "results.json").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(tmp_path)])
    assert stop.value.code == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_text() == "mine"


@pytest.mark.parametrize("flags", [["--seeds", "0"], ["--seeds", "x"], ["--forget-weight", "-1"]])
def test_bad_flags_end_in_status_2(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_the_default_is_one_seed():
    args = make_parser().parse_args([])
    assert (args.seed, args.seeds, args.output) == (0, 1, None)


@pytest.fixture
def tiny():
    from selsft.demo.experiment import DemoConfig
    from selsft.demo.train import Recipe

    # Long enough that the base believes its myths and the reference does not, so that some tokens turn negative
    return DemoConfig(
        world=WorldConfig(countries=4), vocab_size=320, hidden_size=32, layers=1,
        pretraining=Recipe(epochs=10, learning_rate=1e-2, batch_size=16),
        reference=Recipe(epochs=10, learning_rate=1e-2, batch_size=8),
        training=Recipe(epochs=2, learning_rate=1e-2, batch_size=16),
    )  # fmt: skip


def test_the_whole_flow_runs(tiny, tmp_path):
    from io import StringIO

    from rich.console import Console

    from selsft.demo.experiment import ARMS
    from selsft.demo.run import run

    screen = StringIO()
    (result,) = run(tiny, [1], tmp_path, Console(file=screen, width=110))
    made = {"README.md", "config.json", "results.json", "results.csv", "report.html", "seed-1"}
    assert {p.name for p in tmp_path.iterdir()} == made
    saved = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert saved["results"][0]["scores"]["plain SFT"]["exact_match"] == result.scores["plain SFT"].exact_match
    assert saved["config"]["world"]["countries"] == 4 and saved["versions"]["torch"]
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        assert [row["model"] for row in csv.DictReader(file)] == list(ARMS)
    for text in (screen.getvalue(), (tmp_path / "report.html").read_text(encoding="utf-8")):
        assert "injected" in text and "toy" in text and "forget negatives" in text
    assert result.tokens.negative_share > 0
    probabilities = [result.scores[arm].wrong_probability for arm in ARMS[2:]]
    assert len(set(probabilities)) == 3  # three different models came out of one start

    before = (tmp_path / "results.csv").read_text(encoding="utf-8")
    (tmp_path / "results.json").unlink()  # interrupted before its end: everything that was trained is reused
    screen.truncate(0)
    run(tiny, [1], tmp_path, Console(file=screen, width=110))
    lines = [line for line in screen.getvalue().splitlines() if line.startswith("[")]
    assert len(lines) == 7 and all("skipped" in line for line in lines)
    assert (tmp_path / "results.csv").read_text(encoding="utf-8") == before
