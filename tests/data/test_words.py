"""Words of tokens against words of the text."""

import re

import numpy as np
import pytest

from selsft.data.alignment import Alignment
from selsft.data.tokenizers import special_ids
from selsft.data.words import Words
from tests.support import tokenizers

TEXTS = [
    'The quick, lazy dog jumps over (two) 12 dogs; it\'s "fine".',
    "don't stop -- now... A1b2 naïve façade",
    "日本語 and \U0001f600 emoji",
]
WORD = re.compile(r"[\u4e00-\u9fff]|(?:(?![\u4e00-\u9fff])\w)+(?:['’]\w+)*|[^\w\s]+")


@pytest.mark.parametrize("name", tokenizers.NAMES)
@pytest.mark.parametrize("text", TEXTS)
def test_words_are_those_of_the_text(name, text):
    tokenizer = tokenizers.family(name)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = Words(tokenizer).number(np.array(ids), np.array([len(ids)]))
    wanted = Alignment(tokenizer).tokens(ids, text, [match.span() for match in WORD.finditer(text)])
    own = np.full(len(ids), -1)
    for word, tokens in enumerate(wanted):  # a token belongs to its first word
        own[[token for token in tokens if own[token] < 0]] = word
    own[np.isin(ids, special_ids(tokenizer))] = -1  # an unknown token says nothing of its text
    for first, second in zip(range(len(ids)), range(1, len(ids)), strict=False):
        if own[first] >= 0 and own[second] >= 0 and "'" not in tokenizer.decode(ids[first : second + 1]):
            assert (found[first] == found[second]) == (own[first] == own[second]), tokenizer.decode(ids[first:][:2])


def test_rows_and_special_tokens_begin_words():
    tokenizer = tokenizers.family(tokenizers.NAMES[0])
    words = Words(tokenizer)
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    assert words.number(np.array(ids + ids), np.array([len(ids)] * 2))[-1] == 1
    assert words.number(np.array([end, end]), np.array([2])).tolist() == [0, 1]
    assert words.number(np.array([], np.int64), np.array([0])).size == 0
