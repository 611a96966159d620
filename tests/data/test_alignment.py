"""Tokens and characters, against an oracle that decodes one token more at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selsft.data.alignment import Alignment
from tests.support import tokenizers
from tests.support.characters import tokens_of_characters

PIECES = [
    "The", " quick", "fox", " ", "\n\n", "\t", "1234", "doesn't", "café", "e\u0301", "n\u0303\u0323", "\u0301",
    "\u200f", "\u1112\u1161\u11ab", "😀", "👍🏽", "👩‍👩‍👧", "שלום", " مرحبا", "你好", "한국어",
    "ß", "½", "ﬁ", "-", "'s", ".",
]  # fmt: skip
TEXTS = [
    "The quick brown fox",
    "naïve café, e\u0301te\u0301 and n\u0303o",
    "😀👍🏽 family 👩‍👩‍👧 x",
    "עולם שלום and مرحبا بالعالم",
    "你好 こんにちは 한국어",
    " leading and trailing ",
    "a\n\nb\tc",
    "Zebra",  # a letter that no token joins to the dummy prefix
    "\u1112\u1161\u11ab \u1100\u116e\u11a8",  # Hangul that a normaliser composes
]


def aligned(name, text):
    tokenizer = tokenizers.family(name)
    ids = tokenizer(text)["input_ids"]
    ranges = [(character, character + 1) for character in range(len(text))]
    found = Alignment(tokenizer).tokens(ids, text, ranges, special=True)
    return [set(tokens.tolist()) for tokens in found], tokens_of_characters(tokenizer, ids, text, name)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", tokenizers.NAMES)
def test_each_character_belongs_to_the_tokens_that_spell_it(name, text):
    if name == "unigram":  # has no byte fallback: what it does not know is one <unk>, and cannot be decoded
        text = " ".join("".join(character for character in text if character.isascii()).split())
    found, expected = aligned(name, text)
    assert found == expected
    assert all(found)


@pytest.mark.parametrize("name", [name for name in tokenizers.NAMES if name != "unigram"])
@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join))
def test_any_text(name, text):
    found, expected = aligned(name, text)
    assert found == expected


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([*PIECES, "▁", "<", "\u2028"]), min_size=1, max_size=8).map("".join),
    st.sampled_from(tokenizers.NAMES),
)
def test_no_character_is_lost(text, name):
    """Also those that a tokenizer rewrites, and those it does not know."""
    tokenizer = tokenizers.family(name)
    ids = tokenizer(text)["input_ids"]
    ranges = [(character, character + 1) for character in range(len(text))]
    found = Alignment(tokenizer).tokens(ids, text, [*ranges, (0, len(text))], special=True)
    assert all(tokens.size for tokens in found)
    first = [int(tokens[0]) for tokens in found[:-1]]
    assert first == sorted(first)
    assert set(found[-1].tolist()) == set(np.concatenate(found[:-1]).tolist())


def test_a_space_that_is_collapsed_belongs_to_the_token_that_is_left():
    tokenizer = tokenizers.family("unigram")
    ids = tokenizer("the  fox")["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    for space in ((3, 4), (4, 5)):
        (found,) = Alignment(tokenizer).tokens(ids, "the  fox", [space], special=True)
        assert [tokens[index][0] for index in found] == ["▁"]


@pytest.mark.parametrize("text", ["Zebra ﬁn", "Ｚebra"])
def test_a_text_that_is_normalised(text):
    """The dummy prefix spells none of it."""
    tokenizer = tokenizers.family("unigram")
    assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])[1] == "▁"
    found, expected = aligned("unigram", text)
    assert found == expected


def test_an_unknown_character_is_its_unk_token():
    tokenizer = tokenizers.family("unigram")
    text = "the 😀 fox"
    ids = tokenizer(text)["input_ids"]
    (found,) = Alignment(tokenizer).tokens(ids, text, [(4, 5)], special=True)
    assert [ids[index] for index in found] == [tokenizer.unk_token_id]


def test_a_text_of_other_tokens_is_refused():
    tokenizer = tokenizers.family("qwen")
    with pytest.raises(ValueError, match="not those of its text"):
        Alignment(tokenizer).tokens(tokenizer("another")["input_ids"], "text", [(0, 1)])


def test_special_tokens_in_the_text():
    """A chat template writes them itself."""
    for name in tokenizers.NAMES:
        tokenizer = tokenizers.family(name)
        messages = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        start = text.index("dog")
        (found,) = Alignment(tokenizer).tokens(ids, text, [(start, start + 3)])
        assert tokenizer.decode([ids[index] for index in found]).strip() == "dog", name
