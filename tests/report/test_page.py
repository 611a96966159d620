"""What every page does with text."""

import unicodedata

import pytest

from selsft.report.page import visible

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
