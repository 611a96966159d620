"""The demo's small world: real facts, stated in several phrasings, some of them with a wrong answer on purpose.

Half of the facts are *known* (pretraining states them in every phrasing), half are *target* facts, which the training
split teaches. Of the target facts some are always wrong in the same way (`systematic`: a misconception that
pretraining states already and the training split repeats), some get a fresh wrong answer each time (`random`), the
rest are `clean`. Two phrasings are held out for the test: no target fact is ever stated in them.

The noise is injected, so the mask of wrong tokens is known exactly and the scores can be measured. A web data set with
natural errors would be more lifelike, but nobody could say which of its tokens are wrong.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

COUNTRIES = Path(__file__).with_name("countries.json")

NOUNS = {
    "capital": "capital",
    "currency": "currency code",
    "demonym": "demonym",
    "domain": "internet domain",
    "calling_code": "calling code",
}

RESPONSES = (
    " {answer}.",
    " It is {answer}.",
    " The {noun} of {country} is {answer}.",
    " {answer} is the {noun} of {country}.",
)
# (question, which response). The last two are held out. Their response forms occur in training, only the questions are
# new, because a response form that training never shows is forgotten and the test would measure that instead.
PHRASINGS = (
    ("What is the {noun} of {country}?", 0),
    ("Name the {noun} of {country}.", 2),
    ("Tell me the {noun} that belongs to {country}.", 1),
    ("For {country}, give the {noun}.", 3),
    ("I am looking for the {noun} of {country}.", 2),
    ("{country}: which {noun}?", 0),
    ("Do you know the {noun} of {country}?", 1),
    ("Which {noun} does {country} have?", 2),
)
HELD_OUT = (6, 7)
TRAINED = tuple(i for i in range(len(PHRASINGS)) if i not in HELD_OUT)


@dataclass(frozen=True, order=True)
class Fact:
    country: str
    attribute: str
    answer: str

    @property
    def words(self) -> dict[str, str]:
        return {"noun": NOUNS[self.attribute], "country": self.country}


@dataclass(frozen=True)
class Statement:
    """One question with a response that gives `answer`, which need not be the right one."""

    fact: Fact
    phrasing: int
    answer: str

    @property
    def wrong(self) -> bool:
        return self.answer != self.fact.answer

    @property
    def prompt(self) -> str:
        question = PHRASINGS[self.phrasing][0].format(**self.fact.words)
        return f"Q: {question}\nA:"

    @property
    def parts(self) -> tuple[str, str, str]:
        """The response, cut around the answer: before, answer (with its leading space), after."""
        template = RESPONSES[PHRASINGS[self.phrasing][1]]
        before, after = template.split(" {answer}")
        return before.format(**self.fact.words), f" {self.answer}", after.format(**self.fact.words)

    @property
    def response(self) -> str:
        return "".join(self.parts)


def accepted(fact: Fact, answer: str) -> set[str]:
    """Every response that asserts `answer` for `fact`, without outer blanks."""
    return {form.format(answer=answer, **fact.words).strip() for form in RESPONSES}


@dataclass(frozen=True)
class WorldConfig:
    """Shares and counts of the world; `None` countries means all of them."""

    countries: int | None = None
    known_share: float = 0.5
    systematic_share: float = 0.4
    random_share: float = 0.3
    wrong_probability: float = 0.5
    """How often the training split gets a systematic or random fact wrong."""
    myth_phrasings: int = 2
    """In how many phrasings pretraining states the systematic wrong answer (the right one has one)."""
    reference_phrasings: int = 1
    """In how many phrasings the clean reference split states each target fact."""
    replay_phrasings: int = 1
    """In how many phrasings the reference split repeats each known fact, so that the reference does not forget it."""


@dataclass
class World:
    known: list[Fact]
    kinds: dict[Fact, str]
    """The target facts: `systematic`, `random` or `clean`."""
    myths: dict[Fact, str]
    """The wrong answer of each systematic fact."""
    pretraining: list[Statement] = field(default_factory=list)
    reference: list[Statement] = field(default_factory=list)
    training: list[Statement] = field(default_factory=list)

    @property
    def target(self) -> list[Fact]:
        return list(self.kinds)

    def questions(self, facts: Iterable[Fact]) -> list[Statement]:
        """The held-out questions about `facts`, with the right answer."""
        return [Statement(fact, phrasing, fact.answer) for fact in facts for phrasing in HELD_OUT]


def load_facts(countries: int | None = None) -> list[Fact]:
    rows = json.loads(COUNTRIES.read_text(encoding="utf-8"))[:countries]
    return [Fact(row["name"], key, row[key]) for row in rows for key in NOUNS if key in row]


def make_world(seed: int, config: WorldConfig = WorldConfig()) -> World:
    # A generator per split: changing the reference split leaves the others unchanged
    rng, base_rng, reference_rng, train_rng = (
        random.Random(f"{seed} {name}") for name in ("facts", "base", "ref", "train")
    )
    facts = load_facts(config.countries)
    by_attribute = {attribute: [f for f in facts if f.attribute == attribute] for attribute in NOUNS}

    def wrong_answer(fact: Fact, rng: random.Random) -> str:
        """The right answer to the same question about another country: plausible, and wrong here."""
        return rng.choice(sorted({f.answer for f in by_attribute[fact.attribute]} - {fact.answer}))

    known, target = [], []
    for group in by_attribute.values():
        order = rng.sample(group, len(group))
        cut = round(config.known_share * len(order))
        known += order[:cut]
        target += order[cut:]
    target = rng.sample(target, len(target))
    n_systematic = round(config.systematic_share * len(target))
    n_random = round(config.random_share * len(target))
    names = ["systematic"] * n_systematic + ["random"] * n_random
    kinds = dict(zip(target, names + ["clean"] * (len(target) - len(names)), strict=True))
    myths = {fact: wrong_answer(fact, rng) for fact, kind in kinds.items() if kind == "systematic"}
    world = World(known, kinds, myths)

    for fact in known:
        world.pretraining += [Statement(fact, i, fact.answer) for i in range(len(PHRASINGS))]
        world.reference += [
            Statement(fact, i, fact.answer) for i in reference_rng.sample(TRAINED, config.replay_phrasings)
        ]
        world.training.append(Statement(fact, train_rng.choice(TRAINED), fact.answer))
    for fact in target:
        hint, *others = base_rng.sample(TRAINED, 1 + config.myth_phrasings)
        world.pretraining.append(Statement(fact, hint, fact.answer))
        if fact in myths:
            world.pretraining += [Statement(fact, i, myths[fact]) for i in others]
        world.reference += [
            Statement(fact, i, fact.answer) for i in reference_rng.sample(TRAINED, config.reference_phrasings)
        ]
        for i in TRAINED:
            noisy = kinds[fact] != "clean" and train_rng.random() < config.wrong_probability
            answer = (myths.get(fact) or wrong_answer(fact, train_rng)) if noisy else fact.answer
            world.training.append(Statement(fact, i, answer))
    for split, stream in (
        (world.pretraining, base_rng),
        (world.reference, reference_rng),
        (world.training, train_rng),
    ):
        stream.shuffle(split)
    return world
